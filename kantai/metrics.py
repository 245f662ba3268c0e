"""What happened? One flat record an update, in ``metrics.jsonl`` and TensorBoard, with slash names."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text
from tqdm import tqdm

from kantai.checkpoint import CheckpointStore

_RATE_WINDOW_UPDATES = 50
_FLUSH_SECONDS = 30.0


class Metrics:
    """The record of a run, kept by rank 0. A resumed run goes on after its last checkpoint: what was logged later is dropped."""

    def __init__(self, run_dir: Path, store: CheckpointStore, first_update: int, allocated_since: float) -> None:
        """Open the record.

        Raises:
            UserError: a later start of the run keeps it now; nothing was changed.
        """
        self._path = run_dir / "metrics.jsonl"
        records = list(read_metrics(self._path)) if self._path.exists() else []
        kept = [record for record in records if record["update"] < first_update]
        with store.replaced(self._path) as partial:
            partial.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        self.goodput = Goodput(run_dir / "starts.jsonl", allocated_since, records, kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(run_dir / "tensorboard", first_update)

    def write(self, update: int, record: Mapping[str, float]) -> None:
        """Add the record of an update, counted from 1."""
        numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}  # NaN is no JSON
        self._file.write(json.dumps({"update": update, "time": round(time.time(), 3), **numbers}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if math.isfinite(value):
                self._tensorboard.add(scalar(name, value), update)

    def write_text(self, update: int, name: str, markdown: str) -> None:
        """Add a text to TensorBoard."""
        self._tensorboard.add(text(name, markdown), update)

    def last(self, name: str, count: int) -> list[float]:
        """The last finite values of a metric of updates that were not skipped, oldest first."""
        found = (record.get(name) for record in read_metrics(self._path) if not record.get("train/skipped"))
        return [value for value in found if isinstance(value, float)][-count:]

    def has(self, update: int, name: str) -> bool:
        """Whether something was recorded of an update."""
        return any(record["update"] == update and name in record for record in read_metrics(self._path))

    def flush(self) -> None:
        """Have on the disk what was written so far."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._tensorboard.close()


class TensorBoard:
    """A file of events, for which what earlier files say of later updates is void.

    Written at once: tensorboardX's own writer has a thread for it, and where that fails, as on a full disk, who calls it waits for ever.
    """

    def __init__(self, folder: Path, first_update: int) -> None:
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._flushed = 0.0
        self._write(Event(step=first_update, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, update: int) -> None:
        """Add a summary of an update."""
        self._write(Event(step=update, summary=summary))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and write no more."""
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self.flush()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that a kill tore is passed over."""
    for record in _read_json_lines(path):
        if isinstance(record.get("update"), int) and isinstance(record.get("time"), float):
            yield record


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


class Goodput:
    """Share of the time in which nodes were allocated to a run that went into updates it kept, over all its starts.

    The rest is starting, compiling, saving, evaluating, and updates that were lost and done again. ``starts.jsonl`` has when each start
    got its nodes, and for how long they had been allocated before; a start counts up to its last record.
    """

    def __init__(self, path: Path, allocated_since: float, records: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
        earlier = [(line.get("began"), line.get("seconds_before")) for line in _read_json_lines(path)] if path.exists() else []
        self._before, self._since = 0.0, allocated_since
        for began, before in earlier[-1:]:
            if isinstance(began, float) and isinstance(before, float):
                ended = max([began, *(record["time"] for record in records)])
                self._before, self._since = before + ended - began, max(ended, allocated_since)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"began": self._since, "seconds_before": self._before}) + "\n")
        times = (record.get("speed/update_seconds") for record in kept if not record.get("train/skipped"))
        self._useful = sum(seconds for seconds in times if isinstance(seconds, float))

    def add(self, seconds: float) -> float:
        """Count an update that was not skipped, and return the goodput."""
        self._useful += seconds
        return self._useful / max(self._before + time.time() - self._since, self._useful)


class Speed:
    """Tokens a second and model FLOPs utilisation over the last updates. Pauses (evaluation, saving) do not count."""

    def __init__(self, machine_flops_per_second: float) -> None:
        self._machine = machine_flops_per_second
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RATE_WINDOW_UPDATES)

    def add(self, seconds: float, tokens: int, flops: int) -> None:
        """Add an update of all ranks."""
        self._recent.append((seconds, tokens, flops))

    @property
    def seconds_per_update(self) -> float:
        """Mean of the last updates."""
        return sum(seconds for seconds, _, _ in self._recent) / max(1, len(self._recent))

    def record(self) -> dict[str, float]:
        """``mfu`` is the share of the measured rate of this machine's matrix products, not of a data sheet's."""
        seconds = sum(seconds for seconds, _, _ in self._recent) or math.inf
        return {
            "speed/tokens_per_second": sum(tokens for _, tokens, _ in self._recent) / seconds,
            "speed/mfu": sum(flops for _, _, flops in self._recent) / seconds / self._machine,
        }


class Progress:
    """A bar with loss, tokens a second and time left on a terminal; a plain line now and then elsewhere."""

    _SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, first_update: int, total_updates: int, *, show: bool) -> None:
        self._show, self._total = show, total_updates
        self._bar: Any = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=total_updates, initial=first_update, unit="update", dynamic_ncols=True, file=sys.stderr)
        self._next_line = 0.0

    def update(self, update: int, loss: float, tokens_per_second: float, seconds_per_update: float) -> None:
        """Show that ``update`` updates are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(update - self._bar.n)
        elif self._show and (time.monotonic() >= self._next_line or update == self._total):
            left = (self._total - update) * seconds_per_update
            print(
                f"update {update}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{int(left // 60)}:{int(left % 60):02d} left",
                flush=True,
            )
            self._next_line = time.monotonic() + self._SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._show:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if os.uname().sysname == "Darwin" else peak / 2**20  # bytes there, KiB on Linux
