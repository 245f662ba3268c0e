"""How does a rank join the others? The world that the launcher announced, or an error."""

import contextlib
import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from kantai import UserError
from kantai.cluster import Place

# Elements of the buckets in which DeepSpeed reduces gradients. Its own 5e8 are more than a RoBERTa has: nothing would go out before the
# backward pass is over, through buffers of 2 GB.
_BUCKET = 25_000_000

# What a DeepSpeed config may say: known to leave the result as it is. Much of the rest rounds, or scrambles what a checkpoint holds, and
# nobody would notice: round_robin_gradients lays weights out in another order than they are read in.
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

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def join(place: Place, max_grad_norm: float, timeout_seconds: float | None = None) -> Accelerator:
    """The accelerator of this rank.

    Args:
        timeout_seconds: of collectives.

    Raises:
        UserError: the world, the backend or DeepSpeed's precision is not what was asked for.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        _keep_memory()
    # Buffers are positions, and never change.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)]
    if deepspeed_announced():
        _quiet_deepspeed(on_cpu)
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    # Without it every rank believes to be alone in the world. With it and without DeepSpeed, reductions do nothing.
    backend = {"backend": "gloo"} if deepspeed_announced() and on_cpu else {}
    handlers.append(InitProcessGroupKwargs(**backend, timeout=timeout))
    # Precision is the model's own affair (autocast in its forward): so weights, moments and gradients are fp32 under every backend.
    accelerator = Accelerator(cpu=on_cpu and not deepspeed_announced(), mixed_precision="no", kwargs_handlers=handlers)
    _refuse_other_world(accelerator, place)
    if deepspeed_announced():
        complete(accelerator.state.deepspeed_plugin.deepspeed_config, max_grad_norm)
    return accelerator


def deepspeed_announced() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def complete(config: dict[str, Any], max_grad_norm: float) -> None:
    """Fill in, in place, what a DeepSpeed config must say to serve us.

    Raises:
        UserError: it says something that is not known to be harmless.
    """
    for section in ("bf16", "fp16"):
        if config.pop(section, {}).get("enabled") is True:
            raise UserError(f"the DeepSpeed config enables {section}: leave that out; the run's training.precision decides")
    zero = config["zero_optimization"]
    _refuse_others(config, _HARMLESS)
    _refuse_others(zero, _HARMLESS_TO_ZERO, "zero_optimization.")
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        _refuse_others(offload, _HARMLESS_TO_OFFLOAD, f"zero_optimization.{part}.")
        if offload.get("device") == "nvme":
            raise UserError(f"the DeepSpeed config has {part} on nvme, which kantai's checkpoints cannot read: use cpu or none")
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 1,  # which serves its own statistics alone
        "gradient_accumulation_steps": 1,  # the engine says at every micro-step whether it is the last
        "gradient_clipping": max_grad_norm if zero["stage"] else 0.0,  # whole gradients are clipped as without DeepSpeed
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW is vectorised on CPU too, and needs no compiler
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every step
    }
    zero.setdefault("reduce_bucket_size", _BUCKET)
    if zero["stage"] == 2 and zero.get("overlap_comm") is None:
        zero["overlap_comm"] = True


def _refuse_others(settings: dict[str, Any], harmless: set[str], prefix: str = "") -> None:
    for name in sorted(settings.keys() - harmless):
        raise UserError(f"the DeepSpeed config sets {prefix}{name}, which is not known to leave the result as it is: leave that out")


def _keep_memory() -> None:
    """Have glibc keep what tensors free, for the next ones.

    It gives large blocks back at once, and the kernel fills every page with zeros when it is asked for them again: a fifth of an update.
    """
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _quiet_deepspeed(on_cpu: bool) -> None:
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found no other
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if on_cpu:
        # It would compile, at every first start, an extension that only inference uses: more than a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger.setLevel("WARNING")


def _refuse_other_world(accelerator: Accelerator, place: Place) -> None:
    """On CPU, Accelerate trains two independent worlds of one in several spellings, or leaves DeepSpeed out, without a word."""
    seen, announced = (accelerator.num_processes, accelerator.process_index), (place.world_size, place.rank)
    backend = accelerator.distributed_type
    if deepspeed_announced():
        expected = [DistributedType.DEEPSPEED]
    else:
        expected = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if place.world_size == 1:
            expected.append(DistributedType.NO)
    if seen != announced or backend not in expected:
        raise UserError(
            f"the launcher announced rank {announced[1]} of {announced[0]} under {expected[0].value}, "
            f"but Accelerate sees rank {seen[1]} of {seen[0]} under {backend.value}: launch with one of configs/accelerate/*.yaml"
        )
