"""Joining the other ranks: the world that the launcher announced, or an error."""

import contextlib
import ctypes
import os
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from kantai.cluster.environment import RankInfo
from kantai.distributed.deepspeed_config import complete, refuse_contradictions
from kantai.errors import UserError

# Options of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def join(
    rank_info: RankInfo,
    max_grad_norm: float,
    precision: str,
    timeout_seconds: float | None = None,
) -> Accelerator:
    """The accelerator of this rank, whose collectives end after ``timeout_seconds``.

    Raises:
        UserError: the world or the backend is not what was asked for, or the launcher asks for
            something that the run's settings contradict.
    """
    _refuse_contradictions(precision)
    if deepspeed_announced():
        refuse_contradictions(os.environ, max_grad_norm)
    on_cpu = not torch.cuda.is_available()
    uses_deepspeed = deepspeed_announced()
    if on_cpu:
        _keep_freed_memory()
    if uses_deepspeed:
        _quiet_deepspeed(on_cpu)
    _stay_on_this_machine(rank_info)
    process_group: dict[str, Any] = {}
    if timeout_seconds is not None:
        process_group["timeout"] = timedelta(seconds=timeout_seconds)
    if uses_deepspeed and on_cpu:
        # Without a backend, every rank believes that it is alone. Without DeepSpeed, naming one
        # makes reductions do nothing.
        process_group["backend"] = "gloo"
    accelerator = Accelerator(
        cpu=on_cpu and not uses_deepspeed,
        # The model itself casts, by autocast in its forward pass. So weights, moments and
        # gradients are fp32 under every backend.
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(**process_group),
        ],
    )
    _check_world(accelerator, rank_info)
    if uses_deepspeed:
        complete(accelerator.state.deepspeed_plugin.deepspeed_config, max_grad_norm)
    return accelerator


def _refuse_contradictions(precision: str) -> None:
    """Refuse what a launcher's file or flags ask for and the run would not do."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(
            f"the launcher asks for mixed_precision {asked}, and training.precision is "
            f"{precision}: give --training.precision={asked} for that, or the launcher "
            "mixed_precision: no (docs/distributed.md)"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise UserError(
            f"the launcher asks for dynamo_backend {compiler}: leave that out, and give "
            "--training.compile=true"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(
            f"the launcher asks for gradient_accumulation_steps {steps}: leave that out; they "
            "follow from batch.global_batch_size, batch.micro_batch_size and the ranks"
        )


def _stay_on_this_machine(rank_info: RankInfo) -> None:
    """Have gloo listen on loopback where all ranks are on one machine.

    By default it listens on the address of the host name, which other machines reach. A card that
    the user has named stays.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != str(rank_info.world_size):
        return
    loopbacks = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # fails where loopback is down
        for name in loopbacks:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def deepspeed_announced() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free, for the next ones.

    It gives large blocks back at once, and the kernel fills every page with zeros when it is asked
    for them again: a fifth of a step.
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
        # It would compile, at every first start, an extension that only inference uses: more than
        # a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger.setLevel("WARNING")


def _check_world(accelerator: Accelerator, rank_info: RankInfo) -> None:
    """Refuse a world that is not the one that the launcher announced.

    On CPU, Accelerate silently trains two worlds of one in several spellings, or leaves DeepSpeed
    out.
    """
    seen = accelerator.process_index, accelerator.num_processes
    announced = rank_info.rank, rank_info.world_size
    backend = accelerator.distributed_type
    if deepspeed_announced():
        expected = [DistributedType.DEEPSPEED]
    else:
        expected = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if rank_info.world_size == 1:
            expected.append(DistributedType.NO)
    if seen == announced and backend in expected:
        return
    raise UserError(
        f"the launcher announced rank {announced[0]} of {announced[1]} under {expected[0].value}, "
        f"but Accelerate sees rank {seen[0]} of {seen[1]} under {backend.value}: "
        "launch with one of configs/accelerate/*.yaml"
    )
