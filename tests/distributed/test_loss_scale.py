"""fp16's loss scale grows while all is well and halves where it is not."""

from kantai.distributed.loss_scale import LossScale


def test_the_loss_scale_grows_when_all_is_well() -> None:
    scale = LossScale("fp16")
    start = scale.value
    for _ in range(2 * LossScale.PATIENCE):
        scale.after(overflowed=False)
    assert scale.value == 4 * start
    for _ in range(100):
        scale.after(overflowed=True)
    assert scale.value == 1
    assert LossScale("bf16").value == 1
