"""What a DeepSpeed config may say, and what it must say to serve us."""

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
