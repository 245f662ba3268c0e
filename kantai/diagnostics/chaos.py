"""Does a run survive what is done to it here? A small one is killed, robbed of ranks, refused space and corrupted, again and again.

Each time it is started anew, by scripts/pretrain.py in real processes; they are forked from this one, which has imported what they need, so
that a start takes a second. When it has come to its end it must have the weights and moments of an undisturbed run, to the last bit, and
the loss of every step once: then no sample was lost, and none shown twice.
"""

import contextlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError
from kantai.preprocessing.starter_corpus import write_starter
from kantai.storage.atomic import Damaged, replaced, verify
from kantai.training.metrics import read_metrics

_ROOT = Path(__file__).parents[2]
_SECONDS_TO_END = 120.0
_SIZES = [
    "--data.seq_len=32", "--model.hidden_size=32", "--model.num_hidden_layers=2", "--model.num_attention_heads=2",
    "--model.intermediate_size=64", "--batch.global_batch_size=8", "--batch.micro_batch_size=2", "--optimizer.warmup_steps=1",
    "--training.max_steps=40", "--checkpoint.every_steps=3", "--checkpoint.keep=3", "--evaluation.max_sequences=4",
    "--evaluation.every_steps=20", "--failures.hang_seconds=60",
]  # fmt: skip
# Of which step's data the last rank's loss is NaN, in the undisturbed run as well. Three in a row are gone back over.
_BAD_DATA = (7, 19, 28, 29, 30, 37)
_MAX_STARTS = 100  # of one run
KILLS = ("any moment", "within a save", "within a prune", "after a save", "one rank")
CORRUPTIONS = ("bit flipped", "file truncated", "file removed", "manifest truncated", "bit of the manifest flipped")


@dataclass
class Tally:
    """What was done so far, and what came of it."""

    kills: Counter[str]
    corruptions: Counter[str]
    full_disks: int = 0
    starts: int = 0
    starts_of_this_run: int = 0
    failed: int = 0
    runs: int = 0
    unseen: list[int] = field(default_factory=list)  # corrupted checkpoints that no start has looked at yet
    detected: int = 0
    undetected: int = 0
    different: int = 0

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """From a file; a new one where there is none."""
        if not path.exists():
            return cls(Counter(), Counter())
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**record, "kills": Counter(record["kills"]), "corruptions": Counter(record["corruptions"])})

    def save(self, path: Path) -> None:
        """Whole, or not at all."""
        with replaced(path) as partial:
            partial.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    def report(self) -> str:
        """As text."""
        kills = ", ".join(f"{moment} {count}" for moment, count in self.kills.items())
        corruptions = ", ".join(f"{what} {count}" for what, count in self.corruptions.items())
        return (
            f"{self.runs} runs, {self.starts} starts\n"
            f"{self.kills.total()} kills: {kills}\n"
            f"{self.corruptions.total()} corruptions: {corruptions}; {self.detected} detected, {self.undetected} not\n"
            f"{self.full_disks} times no space for a checkpoint\n"
            f"{self.failed} starts that nothing was done to failed or hung\n"
            f"{self.different} runs ended with other weights, moments or losses than the undisturbed one"
        )


def chaos(work: Path, kills: int, corruptions: int, ranks: int, seed: int) -> bool:
    """Disturb runs until so many kills and corruptions are done; go on with what an earlier call had done.

    Args:
        work: a folder for all of it, on the storage in question.

    Returns:
        Whether every run ended as the undisturbed one, every corruption was detected, and no start failed by itself.

    Raises:
        UserError: a run does not come to an end.
    """
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "removed", ignore_errors=True)
    data = _prepare(work)
    import torch

    import kantai.training.trainer  # noqa: F401  # before forking

    torch.set_num_threads(1)

    reference = work / "undisturbed"
    if not (reference / "done").exists():
        shutil.rmtree(reference, ignore_errors=True)
        if _Start(_Target(reference, data, ranks)).end() != 0:
            raise UserError(f"the undisturbed run failed: see {reference}.log")
        (reference / "done").touch()
    tally, target = Tally.load(work / "tally.json"), _Target(work / "disturbed", data, ranks)
    with tqdm(total=kills + corruptions, unit="blow") as bar:
        while tally.kills.total() < kills or tally.corruptions.total() < corruptions or (work / "disturbed").exists():
            random_numbers = random.Random(f"{seed} {tally.starts}")
            corrupts = tally.corruptions.total() < corruptions
            _disturb(target, tally, random_numbers, tally.kills.total() < kills or corrupts, corrupts)
            if CheckpointStore(work / "disturbed").steps()[-1:] == CheckpointStore(reference).steps()[-1:]:
                tally.runs += 1
                tally.undetected += len(tally.unseen)
                tally.unseen, tally.starts_of_this_run = [], 0
                tally.different += not _same(work / "disturbed", reference)
                (work / "disturbed").rename(work / "removed")
                shutil.rmtree(work / "removed")
            elif tally.starts_of_this_run == _MAX_STARTS:
                raise UserError(f"{_MAX_STARTS} starts did not bring {target.run} to its end: see {target.log}")
            tally.save(work / "tally.json")
            bar.update(min(kills, tally.kills.total()) + min(corruptions, tally.corruptions.total()) - bar.n)
    print(tally.report(), flush=True)
    return not tally.undetected and not tally.different and not tally.failed


@dataclass(frozen=True)
class _Target:
    """A run that can be started."""

    run: Path
    data: list[str]
    ranks: int

    @property
    def log(self) -> Path:
        """Of its last start."""
        return self.run.with_suffix(".log")


def _disturb(target: _Target, tally: Tally, random_numbers: random.Random, kills: bool, corrupts: bool) -> None:
    """Start the run once, and do something to it or to what it has saved: only what was killed can be corrupted before it ends."""
    tally.starts += 1
    tally.starts_of_this_run += 1
    store = CheckpointStore(target.run)
    if corrupts and not tally.unseen and len(store.steps()) > 1 and random_numbers.random() < 0.5:
        what = random_numbers.choice(CORRUPTIONS)
        tally.unseen = [store.steps()[-1]]
        _corrupt(store.path(store.steps()[-1]), what, random_numbers)
        tally.corruptions[what] += 1
    no_space = random_numbers.random() < 0.05
    start = _Start(target, random_numbers.randrange(100_000) if no_space else None)
    moment = random_numbers.choice(KILLS if target.ranks > 1 else KILLS[:-1])
    if no_space:
        tally.full_disks += 1
        start.end()
    elif kills and random_numbers.random() < 0.9 and start.kill_at(moment, store, random_numbers):
        tally.kills[moment] += 1
    elif start.end() != 0:
        tally.failed += 1
        shutil.copy(target.log, target.run.with_suffix(f".failed-{tally.failed}.log"))
    for step in list(tally.unseen):  # a start that was killed before it looked leaves it to the next
        said = f"checkpoint {step} is damaged" in start.log()
        if not said and _is_damaged(store.path(step)):
            continue
        tally.unseen.remove(step)
        tally.detected += said
        tally.undetected += not said


def _is_damaged(folder: Path) -> bool:
    try:
        verify(folder)
    except Damaged:
        return folder.exists()
    return False


class _Start:
    """The processes of one start of a run."""

    def __init__(self, target: _Target, most_bytes: int | None = None) -> None:
        self.path = target.log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with self.path.open("w") as log:
            self.pids = [self._fork(target, {"RANK": rank, "MASTER_PORT": port}, most_bytes, log.fileno()) for rank in range(target.ranks)]
        self.codes: dict[int, int] = {}

    def _fork(self, target: _Target, place: dict[str, int], most_bytes: int | None, log: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            if target.ranks > 1:
                world = {**place, "WORLD_SIZE": target.ranks, "LOCAL_RANK": place["RANK"], "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {key: str(value) for key, value in world.items()}
            if most_bytes is not None:  # the nearest to a full disk that needs no rights: writes beyond fail half-way
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            if place["RANK"] == target.ranks - 1:
                _poison()
            config = str(_ROOT / "configs" / "quickstart.yaml")
            sys.argv = ["pretrain.py", "--config", config, *_SIZES, *target.data, f"--run_dir={target.run}"]
            runpy.run_path(str(_ROOT / "scripts" / "pretrain.py"), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def alive(self) -> bool:
        """Whether some rank is; those that are not are noted."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def end(self) -> int:
        """Wait for the end; as a launcher does, end all when one fails or all hang. Returns the worst exit code."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while self.alive():
            if time.monotonic() > deadline or any(self.codes.values()):
                self.kill()
            time.sleep(0.01)
        return max(map(abs, self.codes.values()))

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)

    def kill_at(self, moment: str, store: CheckpointStore, random_numbers: random.Random) -> bool:
        """Kill at a moment, or let it end where that does not come; whether it was killed."""
        before = store.steps()
        moments: dict[str, Callable[[], bool]] = {
            "within a save": lambda: _exists(store.folder, ".attempt-*/step-*/state-*"),
            "within a prune": lambda: _exists(store.folder, ".attempt-*/pruned-*"),
            "after a save": lambda: store.steps() != before,
        }
        deadline = time.monotonic() + random_numbers.uniform(0, 6)
        has_come = moments.get(moment, lambda: time.monotonic() > deadline)
        while self.alive() and not has_come():
            time.sleep(0.0002)
        if not self.alive():
            return False
        time.sleep(random_numbers.random() ** 4 * 0.05)
        if moment == "one rank":
            os.kill(random_numbers.choice([pid for pid in self.pids if pid not in self.codes]), signal.SIGKILL)
        else:
            self.kill()
        self.end()
        return True

    def log(self) -> str:
        """What the ranks printed."""
        return self.path.read_text(encoding="utf-8", errors="replace")


def _exists(folder: Path, pattern: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # what is looked through may go meanwhile
        return any(folder.glob(pattern))
    return False


def _poison() -> None:
    """Make this rank's loss NaN on some data."""
    from kantai.training.trainer import Trainer

    real = Trainer.train_step

    def poisoned(self: Trainer, step: int, *rest: Any) -> Any:
        factor = float("nan") if self.skipped_data.data_step(step) in _BAD_DATA else 1.0
        hook = self.engine.raw_model.register_forward_hook(lambda *call: (call[-1][0] * factor, call[-1][1]))
        result = real(self, step, *rest)
        hook.remove()
        return result

    setattr(Trainer, "step", poisoned)  # noqa: B010  # a method of another type, for mypy


def _corrupt(folder: Path, what: str, random_numbers: random.Random) -> None:
    path = folder / "manifest.json" if "manifest" in what else random_numbers.choice(sorted(folder.glob("state-*")))
    content = bytearray(path.read_bytes())
    if "flipped" in what:
        content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(content)
    elif "truncated" in what:
        path.write_bytes(content[: random_numbers.randrange(len(content))])
    else:
        path.unlink()


def _same(run: Path, reference: Path) -> bool:
    """Whether two finished runs have the same last checkpoint, logged the same, each step once, and skipped the same data."""
    last = [verify(CheckpointStore(each).path(CheckpointStore(each).steps()[-1]))["files"] for each in (run, reference)]
    skipped_data = [(each / "skipped_data.jsonl").read_text(encoding="utf-8") for each in (run, reference)]
    return last[0] == last[1] and _losses(run) == _losses(reference) and skipped_data[0] == skipped_data[1]


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]


def _prepare(work: Path) -> list[str]:
    """A corpus, a tokenizer and shards, by the programs; the settings that name them."""
    if not (work / "shards").exists():
        for leftover in ("corpus", "tokenizer"):
            shutil.rmtree(work / leftover, ignore_errors=True)
        (work / "corpus").mkdir()
        write_starter(work / "corpus", "python-docs")
        corpus, tokenizer = ["--input", str(work / "corpus" / "corpus.txt")], str(work / "tokenizer")
        _program("train_tokenizer", *corpus, "--output", tokenizer, "--vocab_size", "1000")
        _program("tokenize_corpus", *corpus, "--tokenizer", tokenizer, "--output", str(work / "shards"), "--document", "paragraph")
    return [f"--data.shards={work / 'shards'}", f"--data.tokenizer={work / 'tokenizer'}"]


def _program(name: str, *arguments: str) -> None:
    command = [sys.executable, str(_ROOT / "scripts" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name}.py failed: {done.stderr.strip()[-500:]}")
