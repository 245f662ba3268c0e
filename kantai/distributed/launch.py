"""How does a rank join the others? The world that the launcher announced, or an error."""

import contextlib
import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from kantai.cluster.environment import RankInfo
from kantai.distributed.deepspeed_config import complete
from kantai.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def join(rank_info: RankInfo, max_grad_norm: float, timeout_seconds: float | None = None) -> Accelerator:
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
    _refuse_other_world(accelerator, rank_info)
    if deepspeed_announced():
        complete(accelerator.state.deepspeed_plugin.deepspeed_config, max_grad_norm)
    return accelerator


def deepspeed_announced() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _keep_memory() -> None:
    """Have glibc keep what tensors free, for the next ones.

    It gives large blocks back at once, and the kernel fills every page with zeros when it is asked for them again: a fifth of a step.
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


def _refuse_other_world(accelerator: Accelerator, rank_info: RankInfo) -> None:
    """On CPU, Accelerate trains two independent worlds of one in several spellings, or leaves DeepSpeed out, without a word."""
    seen, announced = (accelerator.num_processes, accelerator.process_index), (rank_info.world_size, rank_info.rank)
    backend = accelerator.distributed_type
    if deepspeed_announced():
        expected = [DistributedType.DEEPSPEED]
    else:
        expected = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if rank_info.world_size == 1:
            expected.append(DistributedType.NO)
    if seen != announced or backend not in expected:
        raise UserError(
            f"the launcher announced rank {announced[1]} of {announced[0]} under {expected[0].value}, "
            f"but Accelerate sees rank {seen[1]} of {seen[0]} under {backend.value}: launch with one of configs/accelerate/*.yaml"
        )
