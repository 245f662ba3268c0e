"""Facts of one node before a run: its GPUs, versions, disks and an all-reduce."""

import multiprocessing
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import distributed

GIB = 1 << 30
MIB = 1 << 20
TIMEOUT_SECONDS = 60.0
MAX_USED_MIB = 2048  # of a GPU's memory before a run: a driver takes less
# A GPU needs a reset or a repair after these (NVIDIA, XID Errors).
# Others, such as 13 and 31, are errors of a program.
FATAL_XIDS = {48, 64, 74, 79, 95, 119, 120}
_WRITTEN_BYTES = 32 * MIB
_PACKAGES = (
    "kantai",
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


@dataclass(frozen=True)
class Folder:
    """A folder as one node sees it; ``error`` says what failed there."""

    path: str
    free_gib: float = 0.0
    mib_per_second: float = 0.0  # of writes
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """What one node says of itself."""

    node: str
    gpus_given: int = 0  # by SLURM
    gpus_found: int = 0  # by nvidia-smi
    gpus_for_torch: int = 0
    gpu_errors: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    run: Folder = Folder("")
    scratch: Folder = Folder("")
    sees: list[str] = field(default_factory=list)  # nodes whose files are in its run directory
    clock_seconds: float = 0.0  # ahead of the first node's clock
    reduce_ranks: str = ""
    reduce_gib_per_second: float = 0.0
    reduce_error: str = ""


def inspect_node(node: str, run_dir: Path, scratch: Path) -> Facts:
    """Collect the facts that need no other node."""
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    gpus, errors = _inspect_gpus()
    trains_on_cpu = bool(os.environ.get("RANKS_PER_NODE"))
    ranks, speed, failure = _all_reduce()
    return Facts(
        node=node,
        gpus_given=int(os.environ.get("SLURM_GPUS_ON_NODE", "0")),
        gpus_found=len(gpus),
        gpus_for_torch=len(gpus) if trains_on_cpu else torch.cuda.device_count(),
        gpu_errors=errors,
        versions=_versions() | (gpus[0] if gpus else {}),
        run=_inspect_folder(existing),
        scratch=_inspect_folder(scratch),
        reduce_ranks=ranks,
        reduce_gib_per_second=speed,
        reduce_error=failure,
    )


def fatal_xids(kernel_log: str) -> list[str]:
    """Find fatal GPU errors in the kernel's log.

    A line reads ``NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus``.
    """
    found = re.findall(r"NVRM: Xid \((.*?)\): (\d+)", kernel_log)
    fatal = {f"XID {number} of GPU {gpu}" for gpu, number in found if int(number) in FATAL_XIDS}
    return sorted(fatal)


def _inspect_gpus() -> tuple[list[dict[str, str]], list[str]]:
    """Return driver and model of every GPU, and complaints.

    This asks nvidia-smi and not NVML: a call into a driver that hangs would never return, but a
    process can be left behind.
    """
    fields = "driver_version,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    try:
        printed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return [], []
    except subprocess.TimeoutExpired:
        return [], ["nvidia-smi hangs"]
    rows = [line.split(", ") for line in printed.splitlines() if line.count(", ") == 4]

    gpus = []
    memory_errors = []
    memory_used = []
    for number, (driver, model, total, used, errors) in enumerate(rows):
        gpus.append({"driver": driver, "GPU": f"{model} of {total} MiB"})
        if errors.isdigit() and int(errors) > 0:  # GPUs without ECC say [N/A]
            memory_errors.append(f"GPU {number} has {errors} memory errors")
        if used.isdigit() and int(used) > MAX_USED_MIB:
            memory_used.append(f"{used} MiB of GPU {number} are in use")
    models = sorted({gpu["GPU"] for gpu in gpus})
    mixed = [f"GPUs of several kinds: {', '.join(models)}"] if len(models) > 1 else []
    kernel_log = _output("dmesg") if shutil.which("dmesg") else ""  # empty without the right to it
    return gpus, [*memory_errors, *memory_used, *mixed, *fatal_xids(kernel_log)]


def _output(*command: str) -> str:
    """Run a command and return what it printed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()  # and do not wait: SIGKILL does not end a process that hangs in a driver
        raise


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _inspect_folder(path: Path) -> Folder:
    """Measure free space, and how fast a file reaches the disk itself."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free / GIB
        seconds = []
        for _ in range(3):  # the best counts, as others write to a shared disk, too
            # A name that nobody can guess, for which another user cannot have made a link.
            with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=path) as opened:
                start = time.perf_counter()
                opened.write(bytes(_WRITTEN_BYTES))
                opened.flush()
                os.fsync(opened.fileno())
                seconds.append(time.perf_counter() - start)
        return Folder(str(path), free, _WRITTEN_BYTES / MIB / min(seconds))
    except OSError as error:
        return Folder(str(path), error=f"{path}: {error.strerror}")


def _all_reduce() -> tuple[str, float, str]:
    """Sum values over this node's GPUs, or over two processes where it has none.

    Returns:
        A name for the ranks, the bus bandwidth in GiB per second, and the error if there was one.
    """
    on_gpu = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if on_gpu else 2
    name = f"{'nccl' if on_gpu else 'gloo'} x{ranks}"
    get_context = multiprocessing.get_context
    context = get_context("spawn") if on_gpu else get_context("fork")  # CUDA survives no fork
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_reduce_rank, args=(rank, ranks, port, results), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 2 * TIMEOUT_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()

    if any(process.exitcode for process in processes) or results.empty():
        among = "over its own GPUs" if on_gpu else "between its processes"
        return name, 0.0, f"all-reduce {among} fails"
    seconds, correct = results.get()
    bus_gib = 2 * (ranks - 1) / max(1, ranks) * _reduced_bytes(on_gpu) / GIB
    return name, bus_gib / seconds, "" if correct else "all-reduce gives wrong sums"


def _reduced_bytes(on_gpu: bool) -> int:
    return 256 * MIB if on_gpu else 16 * MIB


def _reduce_rank(
    rank: int, ranks: int, port: int, results: "SimpleQueue[tuple[float, bool]]"
) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    values = torch.arange(_reduced_bytes(on_gpu) // 4, device=device).remainder(251).float()
    expected = values * ranks
    seconds = []
    correct = True
    for _ in range(4):
        reduced = values.clone()
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(reduced)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        correct &= bool(torch.equal(reduced, expected))
    if rank == 0:
        results.put((min(seconds), correct))
    distributed.destroy_process_group()
