"""What a DeepSpeed config may say, and what it must say to serve us."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kantai.errors import UserError

# Elements of the buckets in which DeepSpeed reduces gradients. Its own 5e8 are more than a RoBERTa
# has: nothing would go out before the backward pass is over, through buffers of 2 GB.
_BUCKET = 25_000_000

# What a DeepSpeed config may say: known to leave the result as it is. Much of the rest rounds, or
# scrambles what a checkpoint holds, and nobody would notice: round_robin_gradients lays weights out
# in another order than they are read in.
_HARMLESS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "zero_optimization",
}
_HARMLESS_TO_ZERO = {
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "sub_group_size",
    "offload_optimizer",
    "offload_param",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
}
_HARMLESS_TO_OFFLOAD = {"device", "nvme_path", "pin_memory"}


# Sizes that follow from the run's own settings.
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def refuse_contradictions(environment: Mapping[str, str], max_grad_norm: float) -> None:
    """Refuse what the launcher or its DeepSpeed file ask for and the run would not do.

    Raises:
        UserError: the file is missing or is no DeepSpeed config, or it or the launcher says another
            batch size or clipping than the run's settings.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = {} if path == "none" else _read(Path(path))
    for name in _SIZES:
        if config.get(name, "auto") != "auto":
            raise UserError(
                f"the DeepSpeed config {path} sets {name} {config[name]!r}: leave that out; "
                "batch.global_batch_size and batch.micro_batch_size decide"
            )
    clipping = config.get("gradient_clipping", environment.get("ACCELERATE_GRADIENT_CLIPPING"))
    if clipping in (None, "none", "auto"):
        return
    if _number(clipping) != max_grad_norm:
        raise UserError(
            f"DeepSpeed is asked for gradient_clipping {clipping}, and optimizer.max_grad_norm is "
            f"{max_grad_norm}: leave gradient_clipping out, or give "
            f"--optimizer.max_grad_norm={clipping}"
        )


def _read(path: Path) -> dict[str, Any]:
    """A DeepSpeed file, which has at least a ZeRO stage."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the deepspeed_config_file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the deepspeed_config_file {path} is not JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(
            f"the deepspeed_config_file {path} has no zero_optimization with a stage from 0 to 3"
        )
    for part in ("offload_optimizer", "offload_param", "bf16", "fp16"):
        section = config.get(part) if part in ("bf16", "fp16") else zero.get(part)
        if section is not None and not isinstance(section, dict):
            raise UserError(f"the deepspeed_config_file {path}: {part} is no section")
    return dict(config)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def complete(config: dict[str, Any], max_grad_norm: float) -> None:
    """Set, in place, what a DeepSpeed config must say for kantai's engine.

    Raises:
        UserError: the config says something that is not known to be harmless.
    """
    for section in ("bf16", "fp16"):
        if config.pop(section, {}).get("enabled") is True:
            raise UserError(
                f"the DeepSpeed config enables {section}: leave that out; the run's "
                "training.precision decides"
            )
    zero = config["zero_optimization"]
    _refuse_unknown(config, _HARMLESS)
    _refuse_unknown(zero, _HARMLESS_TO_ZERO, "zero_optimization.")
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        _refuse_unknown(offload, _HARMLESS_TO_OFFLOAD, f"zero_optimization.{part}.")
        if offload.get("device") == "nvme":
            raise UserError(
                f"the DeepSpeed config has {part} on nvme, which kantai's checkpoints cannot "
                "read: use cpu or none"
            )
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own statistics alone
        "gradient_accumulation_steps": 1,  # the engine says which micro-step is the last
        # In stage 0 the backend clips whole gradients, as without DeepSpeed.
        "gradient_clipping": max_grad_norm if zero["stage"] else 0.0,
        # PyTorch's fused AdamW is vectorised on CPU, too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # which waits for the device at every step
    }
    zero.setdefault("reduce_bucket_size", _BUCKET)
    if zero["stage"] == 2 and zero.get("overlap_comm") is None:
        zero["overlap_comm"] = True


def _refuse_unknown(settings: dict[str, Any], harmless: set[str], prefix: str = "") -> None:
    for name in sorted(settings.keys() - harmless):
        raise UserError(
            f"the DeepSpeed config sets {prefix}{name}, which is not known to leave the result as "
            "it is: leave that out"
        )
