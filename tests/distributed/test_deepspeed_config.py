"""A DeepSpeed file may contain only settings that leave the result unchanged."""

from typing import Any

import pytest

from kantai.distributed.deepspeed_config import complete
from kantai.errors import UserError


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            "zero_optimization.offload_optimizer.ratio",
        ),
    ],
)
def test_deepspeed_file_with_unknown_setting_is_refused(config: dict[str, Any], name: str) -> None:
    with pytest.raises(
        UserError, match=f"sets {name}, which is not known to leave the result as it is"
    ):
        complete({"zero_optimization": {"stage": 2}, **config}, 1.0)


def test_deepspeed_file_sets_no_precision_or_nvme_offload() -> None:
    with pytest.raises(UserError, match="enables bf16: leave that out"):
        complete({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, 1.0)
    with pytest.raises(UserError, match="has offload_optimizer on nvme"):
        complete({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 1.0)

    config: dict[str, Any] = {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "bf16": {"enabled": "auto"},
    }
    complete(config, 0.5)
    assert (config["gradient_clipping"], config["zero_optimization"]["overlap_comm"]) == (
        0.5,
        False,
    )
    # The throughput timer would wait for the device at every step.
    assert not config["timers"]["throughput"]["enabled"]

    # Another engine of the process completes the same config again.
    complete(config, 0.5)
