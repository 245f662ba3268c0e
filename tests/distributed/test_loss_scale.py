"""The fp16 loss scale grows after good steps and halves after overflows."""

from kantai.distributed.loss_scale import LossScale


def test_fp16_loss_scale_grows_and_halves() -> None:
    scale = LossScale("fp16")
    start = scale.value
    for _ in range(2 * LossScale.PATIENCE):
        scale.after(overflowed=False)
    assert scale.value == 4 * start
    for _ in range(100):
        scale.after(overflowed=True)
    assert scale.value == 1
    assert LossScale("bf16").value == 1
