"""Is the cluster sound? What every node sees of itself, laid side by side before a run is entrusted to them.

One process a node looks at it; they meet in a store on the first node, which judges. A node is bad when it differs from the others or
lacks something. What all nodes lack is no node's fault: it is the set-up that is wrong.
"""

import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kantai.config.schema import Config
from kantai.errors import UserError

GIB, MIB = 1 << 30, 1 << 20
CLOCK_SECONDS = 1.0  # files' times and log lines of several nodes are compared by users and by make-like caches
SLOW_DISK, SLOW_LINKS = 0.1, 0.5  # of the median of all nodes: disks have neighbours, GPUs' links have none
SLOW_DISK_MIB = 50.0  # a second; what writes faster is not slow, however fast the others are
SCRATCH_GIB = 1.0
USED_MIB = 2048  # of a GPU, before a run: more than a driver takes
# Errors that a GPU does not get over without a reset or a repair (NVIDIA, XID Errors); others, such as 13 and 31, are the program's.
FATAL_XIDS = {48, 64, 74, 79, 95, 119, 120}
_WRITTEN_BYTES = 32 * MIB
_TIMEOUT_SECONDS = 60.0
_COMING_SECONDS = 300.0  # that a node has to come after the first: 64 that import torch from a cold disk take minutes
_CLOCK_EXCHANGES = 5


@dataclass(frozen=True)
class Folder:
    """A folder as one node sees it; ``error`` says what failed there."""

    path: str
    free_gib: float = 0.0
    mib_per_second: float = 0.0
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
    sees: list[str] = field(default_factory=list)  # nodes whose files it sees in the run directory
    clock_seconds: float = 0.0  # ahead of the first node
    reduce_ranks: str = ""
    reduce_gib_per_second: float = 0.0
    reduce_error: str = ""


def run_gib(config: Config) -> float:
    """Room that a run's checkpoints need, in GiB: as many as are kept and one more, of weights and moments in fp32."""
    model = config.model
    parameters = model.num_hidden_layers * (4 * model.hidden_size + 2 * model.intermediate_size) * model.hidden_size
    parameters += 64_000 * model.hidden_size  # more entries than RoBERTa's vocabulary has
    return 12 * parameters * (config.checkpoint.keep + 1) / GIB


def inspect_node(node: str, run_dir: Path, scratch: Path) -> Facts:
    """What this node says of itself, but for what needs the others."""
    run_dir = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    gpus, errors = _gpus()
    ranks, speed, failure = _all_reduce()
    return Facts(
        node=node,
        gpus_given=int(os.environ.get("SLURM_GPUS_ON_NODE", "0")),
        gpus_found=len(gpus),
        gpus_for_torch=len(gpus) if os.environ.get("RANKS_PER_NODE") else torch.cuda.device_count(),  # set for ranks on CPU alone
        gpu_errors=errors,
        versions=_versions() | (gpus[0] if gpus else {}),
        run=_folder(run_dir),
        scratch=_folder(scratch),
        reduce_ranks=ranks,
        reduce_gib_per_second=speed,
        reduce_error=failure,
    )


def exchange(facts: Facts, nodes: Sequence[str], number: int, address: str, port: int) -> list[Facts]:
    """Exchange facts with the other nodes, their clocks and what they see of each other's files among them.

    Args:
        nodes: names of all, in the order of their numbers.
        number: this node's.

    Returns:
        On the first node the facts of all that answered in time; on the others nothing.
    """
    # It waits twice as long for the first node, which may come late itself.
    store = TCPStore(address, port, is_master=number == 0, wait_for_workers=False, timeout=timedelta(seconds=2 * _COMING_SECONDS))
    mark = Path(facts.run.path) / f".preflight-{port}-{facts.node}"
    try:
        if not facts.run.error:
            mark.touch()
            store.add("marks", 1)
        store.add("here", 1)
        end = time.monotonic() + _COMING_SECONDS
        while number == 0 and store.add("here", 0) < len(nodes) and time.monotonic() < end:
            time.sleep(0.05)
        if number == 0:
            store.set("all here", "")
        store.wait(["all here"])
        sees = [] if facts.run.error else _marks_seen(mark, store.add("marks", 0))
        if number > 0:
            store.set(f"facts/{number}", json.dumps(asdict(facts) | {"sees": sees}))
            for exchange in range(_CLOCK_EXCHANGES):
                store.wait([f"ask/{number}/{exchange}"])
                store.set(f"clock/{number}/{exchange}", str(time.time()))
            return []
        others = range(1, len(nodes))
        with suppress(distributed.DistStoreError):  # until all have looked: the file of one that is asked goes
            store.wait([f"facts/{other}" for other in others], timedelta(seconds=_TIMEOUT_SECONDS / 2))
        return [replace(facts, sees=sees), *(found for other in others if (found := _ask(store, other)) is not None)]
    finally:
        mark.unlink(missing_ok=True)


def judge(found: Sequence[Facts], nodes: Sequence[str], need_gib: float) -> dict[str, list[str]]:
    """What is wrong with each node, in words; nothing for a good one."""
    clock = statistics.median(facts.clock_seconds for facts in found)
    allowed_seconds = CLOCK_SECONDS if len(found) > 2 else math.inf  # of two, either may be right, and the table shows it
    disk = {name: _usual_speed([getattr(facts, name) for facts in found]) for name in ("run", "scratch")}
    links = statistics.median(facts.reduce_gib_per_second for facts in found)
    usual = {name: statistics.mode(facts.versions.get(name, "none") for facts in found) for facts in found for name in facts.versions}
    crowd = max((set(facts.sees) for facts in found), key=len)
    wrong: dict[str, list[str]] = {node: ["does not answer"] for node in nodes}
    for facts in found:
        wrong[facts.node] = [
            *facts.gpu_errors,
            *([f"{facts.gpus_found} of {facts.gpus_given} GPUs"] if facts.gpus_found < facts.gpus_given else []),
            *([f"torch finds {facts.gpus_for_torch} of {facts.gpus_found} GPUs"] if facts.gpus_for_torch < facts.gpus_found else []),
            *(f"{name} {facts.versions.get(name, 'none')}, not {usual[name]}" for name in usual if facts.versions.get(name) != usual[name]),
            *([f"clock is {facts.clock_seconds - clock:+.1f} s off"] if abs(facts.clock_seconds - clock) > allowed_seconds else []),
            *_folder_complaints(facts.run, need_gib, disk["run"]),
            *_folder_complaints(facts.scratch, SCRATCH_GIB, disk["scratch"]),
            *(
                [f"{facts.run.path} is another folder there"]
                if not facts.run.error and len(set(facts.sees) & crowd) * 2 <= len(crowd)
                else []
            ),
            *([facts.reduce_error] if facts.reduce_error else []),
            *(["slow GPU links"] if "nccl" in facts.reduce_ranks and facts.reduce_gib_per_second < SLOW_LINKS * links else []),
        ]
    return wrong


def table(found: Sequence[Facts], wrong: dict[str, list[str]]) -> str:
    """A line a node."""
    rows: list[tuple[str, ...]] = [("node", "GPUs", "clock", "run dir", "scratch", "all-reduce", "")]
    by_name = {facts.node: facts for facts in found}
    for node, complaints in wrong.items():
        verdict = "; ".join(complaints) or "good"
        if (facts := by_name.get(node)) is None:
            rows.append((node, "", "", "", "", "", verdict))
            continue
        disks = [f"{folder.free_gib:,.0f} GiB, {folder.mib_per_second:,.0f} MiB/s" for folder in (facts.run, facts.scratch)]
        links = f"{facts.reduce_ranks} {facts.reduce_gib_per_second:.2f} GiB/s"
        rows.append((node, f"{facts.gpus_found}/{facts.gpus_given}", f"{facts.clock_seconds:+.2f} s", *disks, links, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[6]]) for row in rows)


def split(found: Sequence[Facts], wrong: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """(what is wrong on all nodes alike, names of the bad ones). Of a single node, what is wrong with the shared run directory."""
    common = set.intersection(*map(set, wrong.values()))
    if len(wrong) == 1:
        common = {complaint for facts in found for complaint in common if complaint.startswith(facts.run.path)}
    return sorted(common), [node for node, complaints in wrong.items() if set(complaints) - common]


def fatal_xids(kernel_log: str) -> list[str]:
    """Complaints about GPU errors that the kernel's log has, such as ``NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus``."""
    found = re.findall(r"NVRM: Xid \((.*?)\): (\d+)", kernel_log)
    return sorted({f"XID {number} of GPU {gpu}" for gpu, number in found if int(number) in FATAL_XIDS})


def rendezvous() -> tuple[int, str, int]:
    """This node's number, and address and port of the first, as SLURM and slurm/pretrain.sbatch say; alone without them.

    Raises:
        UserError: there are several nodes and no address to meet at.
    """
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" not in env:
        raise UserError("set MASTER_ADDR and MASTER_PORT to the first node's name and a free port: several nodes meet there")
    return int(env.get("SLURM_PROCID", "0")), env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29555"))


def _ask(store: TCPStore, other: int) -> Facts | None:
    """Another node's facts, and how far its clock is ahead of this one's; None where it does not answer."""
    clocks = []  # (seconds an exchange took, seconds ahead): the quickest is the most exact
    try:
        store.wait([f"facts/{other}"], timedelta(seconds=1))
        answer = json.loads(store.get(f"facts/{other}"))
        for exchange in range(_CLOCK_EXCHANGES):
            asked = time.time()
            store.set(f"ask/{other}/{exchange}", "")
            store.wait([f"clock/{other}/{exchange}"], timedelta(seconds=10))
            answered = time.time()
            clocks.append((answered - asked, float(store.get(f"clock/{other}/{exchange}")) - (asked + answered) / 2))
    except distributed.DistStoreError:
        return None
    return Facts(**answer | {"run": Folder(**answer["run"]), "scratch": Folder(**answer["scratch"]), "clock_seconds": min(clocks)[1]})


def _marks_seen(mark: Path, made: int) -> list[str]:
    """Nodes whose files are there, beside this one's own. Shared file systems may show them some seconds late."""
    stem = mark.name.removesuffix(mark.name.rpartition("-")[2])
    seen: set[str] = set()
    end = time.monotonic() + _TIMEOUT_SECONDS / 6
    while time.monotonic() < end and len(seen) < made:
        seen = {path.name.removeprefix(stem) for path in mark.parent.glob(f"{stem}*")}
        time.sleep(0.05)
    return sorted(seen)


def _gpus() -> tuple[list[dict[str, str]], list[str]]:
    """Driver and model of every GPU found, and complaints about errors of theirs and memory that others hold."""
    query = "--query-gpu=driver_version,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    try:
        printed = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return [], []
    except subprocess.TimeoutExpired:
        return [], ["nvidia-smi hangs"]
    rows = [line.split(", ") for line in printed.splitlines() if line.count(", ") == 4]
    complaints = [f"GPU {number} has {ecc} memory errors" for number, (*_, ecc) in enumerate(rows) if ecc.isdigit() and int(ecc) > 0]
    complaints += [
        f"{used} MiB of GPU {number} are in use" for number, (*_, used, _) in enumerate(rows) if used.isdigit() and int(used) > USED_MIB
    ]
    found = [{"driver": driver, "GPU": f"{model} of {total} MiB"} for driver, model, total, *_ in rows]
    kinds = sorted({each["GPU"] for each in found})
    complaints += [f"GPUs of several kinds: {', '.join(kinds)}"] if len(kinds) > 1 else []
    return found, complaints + fatal_xids(_output("dmesg"))  # nothing where users may not read it


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False).stdout


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("kantai", "torch", "accelerate", "deepspeed", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _folder(path: Path) -> Folder:
    """Free space, and how fast a file is written to the disk itself."""
    file = path / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free / GIB
        seconds = []
        for _ in range(3):  # the best of them: others write to a shared disk, too
            start = time.perf_counter()
            with file.open("wb") as opened:
                opened.write(bytes(_WRITTEN_BYTES))
                os.fsync(opened.fileno())
            seconds.append(time.perf_counter() - start)
        return Folder(str(path), free, _WRITTEN_BYTES / MIB / min(seconds))
    except OSError as error:
        return Folder(str(path), error=f"{path}: {error.strerror}")
    finally:
        file.unlink(missing_ok=True)


def _usual_speed(folders: Sequence[Folder]) -> float:
    """In MiB a second; of the folders that could be written to."""
    return statistics.median([folder.mib_per_second for folder in folders if not folder.error] or [0.0])


def _folder_complaints(folder: Folder, need_gib: float, usual_mib_per_second: float) -> list[str]:
    if folder.error:
        return [folder.error]
    if folder.free_gib < need_gib:
        return [f"{folder.path} has less than {need_gib:.1f} GiB free"]  # in the same words on all nodes
    return [f"{folder.path} is slow"] if folder.mib_per_second < min(SLOW_DISK_MIB, SLOW_DISK * usual_mib_per_second) else []


def _all_reduce() -> tuple[str, float, str]:
    """Ranks, bus bandwidth in GiB a second, and what went wrong, of a sum over this node's GPUs, or over two processes."""
    on_gpu = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if on_gpu else 2
    name = f"{'nccl' if on_gpu else 'gloo'} x{ranks}"
    context = multiprocessing.get_context("spawn") if on_gpu else multiprocessing.get_context("fork")  # CUDA does not survive a fork
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_reduce_rank, args=(rank, ranks, port, results), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + 2 * _TIMEOUT_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    if any(process.exitcode for process in processes) or results.empty():
        return name, 0.0, "all-reduce over its own GPUs fails" if on_gpu else "all-reduce between its processes fails"
    seconds, correct = results.get()
    size = _reduced_bytes(on_gpu)
    return name, 2 * (ranks - 1) / max(1, ranks) * size / GIB / seconds, "" if correct else "all-reduce gives wrong sums"


def _reduced_bytes(on_gpu: bool) -> int:
    return 256 * MIB if on_gpu else 16 * MIB


def _reduce_rank(rank: int, ranks: int, port: int, results: "SimpleQueue[tuple[float, bool]]") -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=_TIMEOUT_SECONDS),
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
