"""Test that no kill, full disk or damaged file changes what a run computes on this storage.

A small run is killed, refused disk space and corrupted, again and again. Every start runs
scripts/pretrain.py in real processes. They are forked from this process, which has imported what
they need, so a start takes a second. When the run ends, it must have the weights and moments of
an undisturbed run, to the last bit, and the loss of every step exactly once. Then no sample was
lost, and none was shown twice.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

import kantai.training.trainer  # noqa: F401  # imported before the fork, so that no start waits
from kantai.checkpoint.store import CheckpointStore
from kantai.diagnostics.faults import nan_loss_on_data
from kantai.errors import UserError
from kantai.preprocessing.starter_corpus import write_starter
from kantai.storage.atomic import Damaged, replaced, verify
from kantai.training.metrics import read_metrics

_ROOT = Path(__file__).parents[2]
_MAX_START_SECONDS = 120.0
_MAX_STARTS = 100  # of one run
_SETTINGS = [
    "--data.seq_len=32",
    "--model.hidden_size=32",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
    "--batch.global_batch_size=8",
    "--batch.micro_batch_size=2",
    "--optimizer.warmup_steps=1",
    "--training.max_steps=40",
    "--checkpoint.every_steps=3",
    "--checkpoint.keep=3",
    "--evaluation.max_sequences=4",
    "--evaluation.every_steps=20",
    "--failures.hang_seconds=60",
]
# The last rank's loss is NaN on the data of these steps, in the undisturbed run as well.
# Three in a row make the run roll back.
_BAD_DATA = (7, 19, 28, 29, 30, 37)
KILLS = ("any moment", "within a save", "within a prune", "after a save", "one rank")
CORRUPTIONS = (
    "bit flipped",
    "file truncated",
    "file removed",
    "manifest truncated",
    "bit of the manifest flipped",
)


@dataclass
class Tally:
    """What was done to the runs so far, and what came of it."""

    kills: Counter[str]
    corruptions: Counter[str]
    full_disks: int = 0
    starts: int = 0
    starts_of_this_run: int = 0
    failed: int = 0
    runs: int = 0
    unseen: list[int] = field(default_factory=list)  # corrupted, and not yet looked at by a start
    detected: int = 0
    undetected: int = 0
    different: int = 0

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """Read a tally from a file; start a new one where there is no file."""
        if not path.exists():
            return cls(Counter(), Counter())
        record = json.loads(path.read_text(encoding="utf-8"))
        counters = {name: Counter(record[name]) for name in ("kills", "corruptions")}
        return cls(**{**record, **counters})

    def save(self, path: Path) -> None:
        """Replace the file atomically."""
        with replaced(path) as partial:
            partial.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, nothing went undetected and no start failed by itself."""
        return not (self.undetected or self.different or self.failed)

    def report(self) -> str:
        """Describe the tally for the user."""
        kills = ", ".join(f"{moment} {count}" for moment, count in self.kills.items())
        corruptions = ", ".join(f"{what} {count}" for what, count in self.corruptions.items())
        return (
            f"{self.runs} runs, {self.starts} starts\n"
            f"{self.kills.total()} kills: {kills}\n"
            f"{self.corruptions.total()} corruptions: {corruptions}; "
            f"{self.detected} detected, {self.undetected} not detected\n"
            f"{self.full_disks} starts had no space for a checkpoint\n"
            f"{self.failed} undisturbed starts failed or hung\n"
            f"{self.different} runs ended with other weights, moments or losses "
            "than the undisturbed run"
        )


@dataclass(frozen=True)
class _Target:
    """A run that can be started."""

    run: Path
    data: list[str]  # settings
    ranks: int

    @property
    def log(self) -> Path:
        """What the ranks printed in the last start."""
        return self.run.with_suffix(".log")


def chaos(work: Path, kills: int, corruptions: int, ranks: int, seed: int) -> bool:
    """Disturb runs until so many kills and corruptions are done, counting those of earlier calls.

    Returns:
        Whether every run ended like the undisturbed one, every corruption was detected, and no
        start failed by itself.

    Raises:
        UserError: a run does not come to its end.
    """
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "removed", ignore_errors=True)
    data = _prepare(work)
    torch.set_num_threads(1)
    reference = work / "undisturbed"
    _train_undisturbed(_Target(reference, data, ranks))

    target = _Target(work / "disturbed", data, ranks)
    tally = Tally.load(work / "tally.json")
    with tqdm(total=kills + corruptions, unit="fault") as bar:
        while (
            tally.kills.total() < kills
            or tally.corruptions.total() < corruptions
            or target.run.exists()
        ):
            random_numbers = random.Random(f"{seed} {tally.starts}")
            corrupts = tally.corruptions.total() < corruptions
            # Only a run that was killed before its end has checkpoints to corrupt.
            kills_it = corrupts or tally.kills.total() < kills
            _disturb(target, tally, random_numbers, kills=kills_it, corrupts=corrupts)
            if CheckpointStore(target.run).steps()[-1:] == CheckpointStore(reference).steps()[-1:]:
                _finish(target, tally, reference)
            elif tally.starts_of_this_run == _MAX_STARTS:
                raise UserError(
                    f"{_MAX_STARTS} starts did not bring {target.run} to its end: see {target.log}"
                )
            tally.save(work / "tally.json")
            done = min(kills, tally.kills.total()) + min(corruptions, tally.corruptions.total())
            bar.update(done - bar.n)
    print(tally.report(), flush=True)
    return tally.is_clean


def _prepare(work: Path) -> list[str]:
    """Make a corpus, a tokenizer and shards. Return the settings that name them."""
    if not (work / "shards").exists():
        for leftover in ("corpus", "tokenizer"):
            shutil.rmtree(work / leftover, ignore_errors=True)
        (work / "corpus").mkdir()
        write_starter(work / "corpus", "python-docs")
        corpus = ["--input", str(work / "corpus" / "corpus.txt")]
        tokenizer = str(work / "tokenizer")
        _program("train_tokenizer", *corpus, "--output", tokenizer, "--vocab_size", "1000")
        shards = ["--output", str(work / "shards"), "--document", "paragraph"]
        _program("tokenize_corpus", *corpus, "--tokenizer", tokenizer, *shards)
    return [f"--data.shards={work / 'shards'}", f"--data.tokenizer={work / 'tokenizer'}"]


def _program(name: str, *arguments: str) -> None:
    command = [sys.executable, str(_ROOT / "scripts" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name}.py failed: {done.stderr.strip()[-500:]}")


def _train_undisturbed(target: _Target) -> None:
    """Train the run that all others are compared with, unless an earlier call did."""
    if (target.run / "done").exists():
        return
    shutil.rmtree(target.run, ignore_errors=True)
    if _Start(target).wait() != 0:
        raise UserError(f"the undisturbed run failed: see {target.log}")
    (target.run / "done").touch()


def _disturb(
    target: _Target, tally: Tally, random_numbers: random.Random, *, kills: bool, corrupts: bool
) -> None:
    """Start the run once, and disturb the start or what earlier starts have saved."""
    tally.starts += 1
    tally.starts_of_this_run += 1
    store = CheckpointStore(target.run)
    if corrupts and not tally.unseen and len(store.steps()) > 1 and random_numbers.random() < 0.5:
        _corrupt_newest(store, tally, random_numbers)

    has_no_space = random_numbers.random() < 0.05
    start = _Start(target, random_numbers.randrange(100_000) if has_no_space else None)
    moment = random_numbers.choice(KILLS if target.ranks > 1 else KILLS[:-1])
    if has_no_space:
        tally.full_disks += 1
        start.wait()
    elif kills and random_numbers.random() < 0.9 and start.kill_at(moment, store, random_numbers):
        tally.kills[moment] += 1
    elif start.wait() != 0:
        tally.failed += 1
        shutil.copy(target.log, target.run.with_suffix(f".failed-{tally.failed}.log"))
    _count_detected(target, tally, store)


def _corrupt_newest(store: CheckpointStore, tally: Tally, random_numbers: random.Random) -> None:
    """Corrupt a file of the newest checkpoint."""
    what = random_numbers.choice(CORRUPTIONS)
    step = store.steps()[-1]
    tally.unseen = [step]
    tally.corruptions[what] += 1

    folder = store.path(step)
    path = folder / "manifest.json"
    if "manifest" not in what:
        path = random_numbers.choice(sorted(folder.glob("state-*")))
    content = bytearray(path.read_bytes())
    if "flipped" in what:
        content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(content)
    elif "truncated" in what:
        path.write_bytes(content[: random_numbers.randrange(len(content))])
    else:
        path.unlink()


def _count_detected(target: _Target, tally: Tally, store: CheckpointStore) -> None:
    """Count a corrupted checkpoint by whether the start has reported it."""
    printed = target.log.read_text(encoding="utf-8", errors="replace")
    for step in list(tally.unseen):
        is_reported = f"checkpoint {step} is damaged" in printed
        if not is_reported and _is_damaged(store.path(step)):
            continue  # the start was killed before it looked, and the next one will
        tally.unseen.remove(step)
        tally.detected += is_reported
        tally.undetected += not is_reported


def _is_damaged(folder: Path) -> bool:
    try:
        verify(folder)
    except Damaged:
        return folder.exists()
    return False


def _finish(target: _Target, tally: Tally, reference: Path) -> None:
    """Compare a run that has come to its end with the undisturbed one, and remove it."""
    tally.runs += 1
    tally.undetected += len(tally.unseen)
    tally.unseen = []
    tally.starts_of_this_run = 0
    tally.different += _result(target.run) != _result(reference)
    removed = target.run.with_name("removed")
    target.run.rename(removed)
    shutil.rmtree(removed)


def _result(run: Path) -> tuple[Any, ...]:
    """Hashes of the last checkpoint's files, the logged losses and the skipped data."""
    store = CheckpointStore(run)
    files = verify(store.path(store.steps()[-1]))["files"]
    records = list(read_metrics(run / "metrics.jsonl"))
    losses = [(each["step"], each["train/loss"]) for each in records if "train/loss" in each]
    return files, losses, (run / "skipped_data.jsonl").read_text(encoding="utf-8")


class _Start:
    """The processes of one start of a run."""

    def __init__(self, target: _Target, max_file_bytes: int | None = None) -> None:
        """Start all ranks, which can write no file longer than ``max_file_bytes``."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        with target.log.open("w") as log:
            self.processes = [
                context.Process(target=_train, args=(target, rank, port, max_file_bytes, log))
                for rank in range(target.ranks)
            ]
            for process in self.processes:
                process.start()

    def wait(self) -> int:
        """Wait for all ranks and return the worst exit code.

        Kill all ranks when one fails, as a launcher does, or when they take too long.
        """
        deadline = time.monotonic() + _MAX_START_SECONDS
        while self._running():
            if time.monotonic() > deadline or any(each.exitcode for each in self.processes):
                self.kill()
            time.sleep(0.01)
        return max(abs(each.exitcode or 0) for each in self.processes)

    def kill(self) -> None:
        """Send SIGKILL to all ranks."""
        for process in self.processes:
            process.kill()

    def kill_at(self, moment: str, store: CheckpointStore, random_numbers: random.Random) -> bool:
        """Kill the run at a moment and return True, or False when the run ends before it comes."""
        before = store.steps()
        moments: dict[str, Callable[[], bool]] = {
            "within a save": lambda: _exists(store.folder, ".attempt-*/step-*/state-*"),
            "within a prune": lambda: _exists(store.folder, ".attempt-*/pruned-*"),
            "after a save": lambda: store.steps() != before,
        }
        deadline = time.monotonic() + random_numbers.uniform(0, 6)
        has_come = moments.get(moment, lambda: time.monotonic() > deadline)
        while self._running() and not has_come():
            time.sleep(0.0002)
        running = self._running()
        if not running:
            return False

        time.sleep(random_numbers.random() ** 4 * 0.05)
        if moment == "one rank":
            random_numbers.choice(running).kill()
        else:
            self.kill()
        self.wait()
        return True

    def _running(self) -> list[ForkProcess]:
        return [process for process in self.processes if process.is_alive()]


def _exists(folder: Path, pattern: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # the run may remove a folder during the search
        return any(folder.glob(pattern))
    return False


def _train(target: _Target, rank: int, port: int, max_file_bytes: int | None, log: TextIO) -> None:
    """Run scripts/pretrain.py as one rank, in this forked process."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if target.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(target.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if max_file_bytes is not None:
        # Nothing comes closer to a full disk without root: writes beyond the limit fail half-way.
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    config = str(_ROOT / "configs" / "quickstart.yaml")
    run_dir = f"--run_dir={target.run}"
    sys.argv = ["pretrain.py", "--config", config, *_SETTINGS, *target.data, run_dir]
    with nan_loss_on_data(_BAD_DATA, rank=target.ranks - 1):
        runpy.run_path(str(_ROOT / "scripts" / "pretrain.py"), run_name="__main__")
