"""Compare the nodes of a cluster before a run, and name the bad ones.

One process on every node inspects it. The processes meet in a store on the first node, and the
first node judges. A node is bad when it differs from the others or lacks something. What all
nodes lack is an error of the set-up and not of a node.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]

from kantai.config.schema import Config
from kantai.diagnostics.node import GIB, TIMEOUT_SECONDS, Facts, Folder
from kantai.errors import UserError

MAX_CLOCK_SECONDS = 1.0  # users and make-like caches compare the times of files and log lines
SLOW_DISK = 0.1  # of the median: other jobs share a disk
SLOW_LINKS = 0.5  # of the median: no other job shares the links between GPUs
SLOW_DISK_MIB = 50.0  # a disk that writes more in a second is never slow
SCRATCH_GIB = 1.0
# A node may come so much later than the first: 64 nodes that import torch from a cold disk take
# minutes.
_MAX_WAIT_SECONDS = 300.0
_CLOCK_EXCHANGES = 5


def run_gib(config: Config) -> float:
    """Estimate the space for a run's checkpoints in GiB.

    That is one more than are kept, each with weights and two moments in fp32.
    """
    model = config.model
    width = model.hidden_size
    parameters = model.num_hidden_layers * (4 * width + 2 * model.intermediate_size) * width
    parameters += 64_000 * width  # RoBERTa's vocabulary is smaller
    return 12 * parameters * (config.checkpoint.keep + 1) / GIB


def rendezvous() -> tuple[int, str, int]:
    """Return this node's number, and the first node's address and port.

    SLURM and slurm/pretrain.sbatch set them; without both this node is alone.

    Raises:
        UserError: there are several nodes, but no address.
    """
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" not in env:
        raise UserError(
            "set MASTER_ADDR and MASTER_PORT to the first node's name and a free port: "
            "several nodes meet there"
        )
    address = env.get("MASTER_ADDR", "127.0.0.1")
    return int(env.get("SLURM_PROCID", "0")), address, int(env.get("MASTER_PORT", "29555"))


def exchange(
    facts: Facts, nodes: Sequence[str], number: int, address: str, port: int
) -> list[Facts]:
    """Exchange facts with the other nodes; compare clocks and the files in the run directory.

    Returns:
        On the first node the facts of all nodes that answered in time, on the others nothing.
    """
    # The first node may come late itself, and then waits for the others.
    patience = timedelta(seconds=2 * _MAX_WAIT_SECONDS)
    store = TCPStore(address, port, is_master=number == 0, wait_for_workers=False, timeout=patience)
    mark = Path(facts.run.path) / f".preflight-{port}-{facts.node}"
    try:
        if not facts.run.error:
            mark.touch()
            store.add("marks", 1)
        store.add("here", 1)
        if number == 0:
            _wait_for_nodes(store, len(nodes))
            store.set("all here", "")
        store.wait(["all here"])

        if not facts.run.error:
            facts = replace(facts, sees=_marks_seen(mark, store.add("marks", 0)))
        if number > 0:
            _answer(store, number, facts)
            return []
        return [facts, *_ask_all(store, len(nodes))]
    finally:
        mark.unlink(missing_ok=True)


def _wait_for_nodes(store: TCPStore, nodes: int) -> None:
    end = time.monotonic() + _MAX_WAIT_SECONDS
    while store.add("here", 0) < nodes and time.monotonic() < end:
        time.sleep(0.05)


def _marks_seen(mark: Path, made: int) -> list[str]:
    """Return the nodes whose files are beside this node's.

    A shared file system may show a file some seconds late.
    """
    stem = mark.name.removesuffix(mark.name.rpartition("-")[2])
    seen: set[str] = set()
    end = time.monotonic() + TIMEOUT_SECONDS / 6
    while time.monotonic() < end and len(seen) < made:
        seen = {path.name.removeprefix(stem) for path in mark.parent.glob(f"{stem}*")}
        time.sleep(0.05)
    return sorted(seen)


def _answer(store: TCPStore, number: int, facts: Facts) -> None:
    """Give the first node this node's facts, and its time whenever asked."""
    store.set(f"facts/{number}", json.dumps(asdict(facts)))
    for trial in range(_CLOCK_EXCHANGES):
        store.wait([f"ask/{number}/{trial}"])
        store.set(f"clock/{number}/{trial}", str(time.time()))


def _ask_all(store: TCPStore, nodes: int) -> list[Facts]:
    """Return the other nodes' facts, without those of nodes that do not answer."""
    others = range(1, nodes)
    # A node that was asked removes its mark. So wait until all have looked for marks.
    with suppress(DistStoreError):
        store.wait([f"facts/{other}" for other in others], timedelta(seconds=TIMEOUT_SECONDS / 2))
    answers = [_ask(store, other) for other in others]
    return [facts for facts in answers if facts is not None]


def _ask(store: TCPStore, other: int) -> Facts | None:
    """Return another node's facts and how far its clock is ahead; None if it does not answer."""
    clocks = []  # (seconds the exchange took, seconds ahead)
    try:
        store.wait([f"facts/{other}"], timedelta(seconds=1))
        answer = json.loads(store.get(f"facts/{other}"))
        for trial in range(_CLOCK_EXCHANGES):
            asked = time.time()
            store.set(f"ask/{other}/{trial}", "")
            store.wait([f"clock/{other}/{trial}"], timedelta(seconds=10))
            answered = time.time()
            ahead = float(store.get(f"clock/{other}/{trial}")) - (asked + answered) / 2
            clocks.append((answered - asked, ahead))
    except DistStoreError:
        return None
    folders = {name: Folder(**answer[name]) for name in ("run", "scratch")}
    _, most_exact = min(clocks)  # the quickest exchange
    return Facts(**{**answer, **folders, "clock_seconds": most_exact})


@dataclass(frozen=True)
class _Norm:
    """What a node is compared with: medians and most frequent values over all nodes."""

    need_gib: float
    clock_seconds: float
    max_clock_seconds: float  # off the median
    run_mib_per_second: float
    scratch_mib_per_second: float
    reduce_gib_per_second: float
    versions: dict[str, str]
    sees: set[str]

    @classmethod
    def of(cls, found: Sequence[Facts], need_gib: float) -> "_Norm":
        """Compute the norm of all nodes that answered."""
        names = dict.fromkeys(name for facts in found for name in facts.versions)
        return cls(
            need_gib=need_gib,
            clock_seconds=statistics.median(facts.clock_seconds for facts in found),
            # Of two clocks either may be right. The table shows the difference.
            max_clock_seconds=MAX_CLOCK_SECONDS if len(found) > 2 else math.inf,
            run_mib_per_second=_median_speed([facts.run for facts in found]),
            scratch_mib_per_second=_median_speed([facts.scratch for facts in found]),
            reduce_gib_per_second=statistics.median(facts.reduce_gib_per_second for facts in found),
            versions={
                name: statistics.mode(facts.versions.get(name, "none") for facts in found)
                for name in names
            },
            sees=max((set(facts.sees) for facts in found), key=len),
        )


def _median_speed(folders: Sequence[Folder]) -> float:
    """Return the median in MiB per second of the folders that could be written to."""
    speeds = [folder.mib_per_second for folder in folders if not folder.error]
    return statistics.median(speeds or [0.0])


def _check_gpus(facts: Facts, _norm: _Norm) -> Iterator[str]:
    yield from facts.gpu_errors
    if facts.gpus_found < facts.gpus_given:
        yield f"{facts.gpus_found} of {facts.gpus_given} GPUs"
    if facts.gpus_for_torch < facts.gpus_found:
        yield f"torch finds {facts.gpus_for_torch} of {facts.gpus_found} GPUs"


def _check_versions(facts: Facts, norm: _Norm) -> Iterator[str]:
    for name, usual in norm.versions.items():
        if facts.versions.get(name) != usual:
            yield f"{name} {facts.versions.get(name, 'none')}, not {usual}"


def _check_clock(facts: Facts, norm: _Norm) -> Iterator[str]:
    seconds = facts.clock_seconds - norm.clock_seconds
    if abs(seconds) > norm.max_clock_seconds:
        yield f"clock is {seconds:+.1f} s off"


def _check_disks(facts: Facts, norm: _Norm) -> Iterator[str]:
    yield from _check_disk(facts.run, norm.need_gib, norm.run_mib_per_second)
    yield from _check_disk(facts.scratch, SCRATCH_GIB, norm.scratch_mib_per_second)


def _check_disk(folder: Folder, need_gib: float, usual_mib_per_second: float) -> Iterator[str]:
    if folder.error:
        yield folder.error
    elif folder.free_gib < need_gib:
        yield f"{folder.path} has less than {need_gib:.1f} GiB free"  # the same words on all nodes
    elif folder.mib_per_second < min(SLOW_DISK_MIB, SLOW_DISK * usual_mib_per_second):
        yield f"{folder.path} is slow"


def _check_shared_run_dir(facts: Facts, norm: _Norm) -> Iterator[str]:
    seen = len(norm.sees.intersection(facts.sees))
    if not facts.run.error and seen * 2 <= len(norm.sees):
        yield f"{facts.run.path} is a different folder on this node"


def _check_all_reduce(facts: Facts, norm: _Norm) -> Iterator[str]:
    if facts.reduce_error:
        yield facts.reduce_error
    is_slow = facts.reduce_gib_per_second < SLOW_LINKS * norm.reduce_gib_per_second
    if "nccl" in facts.reduce_ranks and is_slow:
        yield "slow GPU links"


CHECKS: tuple[Callable[[Facts, _Norm], Iterator[str]], ...] = (
    _check_gpus,
    _check_versions,
    _check_clock,
    _check_disks,
    _check_shared_run_dir,
    _check_all_reduce,
)


def judge(found: Sequence[Facts], nodes: Sequence[str], need_gib: float) -> dict[str, list[str]]:
    """Return the complaints about each node, none about a good one."""
    norm = _Norm.of(found, need_gib)
    complaints = {node: ["does not answer"] for node in nodes}
    for facts in found:
        complaints[facts.node] = [each for check in CHECKS for each in check(facts, norm)]
    return complaints


def common_and_bad(
    found: Sequence[Facts], complaints: dict[str, list[str]]
) -> tuple[list[str], list[str]]:
    """Return the complaints that all nodes share, and the names of the nodes that have others.

    A single node shares its run directory with those to come, and nothing else.
    """
    common = set.intersection(*map(set, complaints.values()))
    if len(complaints) == 1:
        paths = tuple(facts.run.path for facts in found)
        common = {each for each in common if each.startswith(paths)}
    return sorted(common), [node for node, each in complaints.items() if set(each) - common]


def table(found: Sequence[Facts], complaints: dict[str, list[str]]) -> str:
    """Format the facts and complaints, one line a node."""
    by_name = {facts.node: facts for facts in found}
    rows = [("node", "GPUs", "clock", "run dir", "scratch", "all-reduce", "")]
    for node, each in complaints.items():
        facts = by_name.get(node)
        cells = ("", "", "", "", "") if facts is None else _cells(facts)
        rows.append((node, *cells, "; ".join(each) or "good"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )


def _cells(facts: Facts) -> tuple[str, str, str, str, str]:
    return (
        f"{facts.gpus_found}/{facts.gpus_given}",
        f"{facts.clock_seconds:+.2f} s",
        _disk_cell(facts.run),
        _disk_cell(facts.scratch),
        f"{facts.reduce_ranks} {facts.reduce_gib_per_second:.2f} GiB/s",
    )


def _disk_cell(folder: Folder) -> str:
    return f"{folder.free_gib:,.0f} GiB, {folder.mib_per_second:,.0f} MiB/s"
