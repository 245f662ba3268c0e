"""Metrics of a run: one flat record a step, in ``metrics.jsonl`` and TensorBoard."""

import itertools
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.json_lines import read_json_lines, read_json_lines_backwards
from kantai.training.clock import WallClock
from kantai.training.throughput import Goodput

METRICS_FILE = "metrics.jsonl"
USEFUL_SECONDS = "speed/useful_seconds"
_EVENT_FILE = "events.out.tfevents."
_END_OF_TIME = 1e10  # the year 2286; what lies behind is a damaged record
_FLUSH_SECONDS = 30.0


class Metrics:
    """The metrics of a run, written by rank 0.

    A resumed run goes on after its last checkpoint: what was logged of later steps is dropped.
    """

    def __init__(
        self, run_dir: Path, store: CheckpointStore, first_step: int, allocated_since: float
    ) -> None:
        """Open the files.

        Raises:
            UserError: a later start of the run writes them now; nothing was changed.
        """
        self._path = run_dir / METRICS_FILE
        earlier = _Earlier(self._path, first_step)
        with store.replaced(self._path) as partial:
            earlier.copy(partial)
        events = run_dir / "tensorboard"
        self._clock = WallClock(max(earlier.last_time, float(newest_event_file(events))))
        self.goodput = Goodput(
            run_dir / "starts.jsonl",
            allocated_since,
            self._clock,
            last_time=earlier.last_time,
            useful_seconds=earlier.useful_seconds(),
        )
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(events, first_step, self._clock)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step, counted from 1."""
        # NaN is no JSON.
        numbers = {name: v if math.isfinite(v) else None for name, v in values.items()}
        record = {"step": step, "time": self._clock.now(), **numbers}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                scalar = Summary.Value(tag=name, simple_value=value)
                self._tensorboard.log(step, Summary(value=[scalar]))

    def log_text(self, step: int, name: str, markdown: str) -> None:
        """Log a text to TensorBoard."""
        self._tensorboard.log(step, text_pb(f"{name}/text_summary", markdown))

    def last(self, name: str, count: int) -> list[float]:
        """The last finite values of a metric, of steps that were not skipped, oldest first."""
        found = (
            record[name]
            for record in _backwards(self._path)
            if isinstance(record.get(name), float) and not record.get("train/skipped")
        )
        return list(itertools.islice(found, count))[::-1]

    def has(self, step: int, name: str) -> bool:
        """Whether a metric of a step was logged."""
        for record in _backwards(self._path):
            if record["step"] == step and name in record:
                return True
            if _is_of_step(record) and record["step"] < step:
                return False
        return False

    def flush(self) -> None:
        """Have on the disk what was logged so far."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def finish(self) -> None:
        """Flush, and log no more."""
        self._file.close()
        self._tensorboard.finish()


class TensorBoard:
    """A file of events, which voids what earlier files say of later steps.

    It is written at once. TensorBoard's own writer has a thread for that, and where the thread
    fails, as on a full disk, its callers wait for ever.
    """

    def __init__(self, folder: Path, first_step: int, clock: WallClock) -> None:
        folder.mkdir(exist_ok=True)
        self._clock = clock
        # TensorBoard reads files in the order of their names.
        number = max(int(clock.now()), newest_event_file(folder) + 1)
        name = f"{_EVENT_FILE}{number}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("ab"))
        self._flushed_at = 0.0
        self._append(Event(file_version="brain.Event:2"))
        session = SessionLog(status=SessionLog.START)
        self._append(Event(step=first_step, session_log=session))

    def log(self, step: int, summary: Any) -> None:
        """Log a summary of a step."""
        self._append(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._records.flush()
        self._flushed_at = time.monotonic()

    def finish(self) -> None:
        """Flush, and log no more."""
        self._records.close()

    def _append(self, event: Any) -> None:
        event.wall_time = self._clock.now()
        self._records.write(event.SerializeToString())
        if time.monotonic() > self._flushed_at + _FLUSH_SECONDS:
            self.flush()


class _Earlier:
    """What earlier starts logged of steps before ``first_step``.

    Only the end of the file is read. Records are written in the order of steps, but for those of a
    checkpoint, which come when it is published. So all that lies before the record of a step that
    is kept is kept, too.

    Attributes:
        last_time: of all records, also of those that are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.last_time = 0.0
        self._path = path
        self._bytes = 0  # that are kept as they are
        self._behind: list[dict[str, Any]] = []  # kept records behind these, last first
        if not path.exists():
            return
        for offset, record in read_json_lines_backwards(path):
            if not _is_of_metrics(record):
                continue
            self.last_time = max(self.last_time, record["time"])
            if record["step"] < first_step:
                self._behind.append(record)
                if _is_of_step(record):
                    self._bytes = offset
                    break

    def copy(self, target: Path) -> None:
        """Write what is kept to another file: a superseded start may still write to this one."""
        if self._bytes:
            shutil.copyfile(self._path, target)  # within the system, without our memory
            os.truncate(target, self._bytes)
        with target.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in reversed(self._behind))

    def useful_seconds(self) -> float:
        """Seconds in steps that are kept. Call it when the file holds these alone."""
        for record in self._behind:
            seconds = record.get(USEFUL_SECONDS)
            if isinstance(seconds, float):
                return seconds
        if not self._path.exists():
            return 0.0
        # Earlier releases did not sum up, so that this reads the whole file, once in a run.
        times = (
            record.get("speed/step_seconds")
            for record in read_metrics(self._path)
            if not record.get("train/skipped")
        )
        return sum(seconds for seconds in times if isinstance(seconds, float))


def read_metrics(path: Path, name: str = "") -> Iterator[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that a kill tore is left out.

    Args:
        name: of a metric; records without it are left out, too.
    """
    for record in read_json_lines(path, containing=name):
        if _is_of_metrics(record) and (not name or name in record):
            yield record


def newest_event_file(folder: Path) -> int:
    """The largest number in the names of TensorBoard's files, 0 without any: a time in seconds."""
    names = (path.name.removeprefix(_EVENT_FILE) for path in folder.glob(f"{_EVENT_FILE}*"))
    numbers = (name.split(".")[0] for name in names)
    times = (int(number) for number in numbers if re.fullmatch("[0-9]{1,10}", number))
    return max(times, default=0)


def _backwards(path: Path) -> Iterator[dict[str, Any]]:
    return (record for _, record in read_json_lines_backwards(path) if _is_of_metrics(record))


def _is_of_metrics(record: dict[str, Any]) -> bool:
    moment = record.get("time")
    is_time = isinstance(moment, float) and 0 <= moment < _END_OF_TIME
    return isinstance(record.get("step"), int) and is_time


def _is_of_step(record: dict[str, Any]) -> bool:
    return "train/loss" in record
