"""Metrics of a run: one flat record a step, in ``metrics.jsonl`` and TensorBoard."""

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.json_lines import read_json_lines
from kantai.training.throughput import Goodput

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
        self._path = run_dir / "metrics.jsonl"
        records = list(read_metrics(self._path)) if self._path.exists() else []
        kept = [record for record in records if record["step"] < first_step]
        with store.replaced(self._path) as partial:
            lines = (f"{json.dumps(record)}\n" for record in kept)
            partial.write_text("".join(lines), encoding="utf-8")
        self.goodput = Goodput(run_dir / "starts.jsonl", allocated_since, records, kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(run_dir / "tensorboard", first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step, counted from 1."""
        # NaN is no JSON.
        numbers = {name: v if math.isfinite(v) else None for name, v in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **numbers}
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
        kept = (record for record in read_metrics(self._path) if not record.get("train/skipped"))
        found = (record.get(name) for record in kept)
        return [value for value in found if isinstance(value, float)][-count:]

    def has(self, step: int, name: str) -> bool:
        """Whether a metric of a step was logged."""
        return any(r["step"] == step and name in r for r in read_metrics(self._path))

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

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
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
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() > self._flushed_at + _FLUSH_SECONDS:
            self.flush()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that a kill tore is left out."""
    for record in read_json_lines(path):
        if isinstance(record.get("step"), int) and isinstance(record.get("time"), float):
            yield record
