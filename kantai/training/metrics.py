"""What happened? One flat record a step, in ``metrics.jsonl`` and TensorBoard, with slash names."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.json_lines import read_json_lines
from kantai.training.throughput import Goodput

_FLUSH_SECONDS = 30.0


class Metrics:
    """The record of a run, kept by rank 0. A resumed run goes on after its last checkpoint: what was logged later is dropped."""

    def __init__(self, run_dir: Path, store: CheckpointStore, first_step: int, allocated_since: float) -> None:
        """Open the record.

        Raises:
            UserError: a later start of the run keeps it now; nothing was changed.
        """
        self._path = run_dir / "metrics.jsonl"
        records = list(read_metrics(self._path)) if self._path.exists() else []
        kept = [record for record in records if record["step"] < first_step]
        with store.replaced(self._path) as partial:
            partial.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        self.goodput = Goodput(run_dir / "starts.jsonl", allocated_since, records, kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(run_dir / "tensorboard", first_step)

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Add the record of a step, counted from 1."""
        numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}  # NaN is no JSON
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if math.isfinite(value):
                self._tensorboard.add(scalar(name, value), step)

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Add a text to TensorBoard."""
        self._tensorboard.add(text(name, markdown), step)

    def last(self, name: str, count: int) -> list[float]:
        """The last finite values of a metric of steps that were not skipped, oldest first."""
        found = (record.get(name) for record in read_metrics(self._path) if not record.get("train/skipped"))
        return [value for value in found if isinstance(value, float)][-count:]

    def has(self, step: int, name: str) -> bool:
        """Whether something was recorded of a step."""
        return any(record["step"] == step and name in record for record in read_metrics(self._path))

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
    """A file of events, for which what earlier files say of later steps is void.

    Written at once: tensorboardX's own writer has a thread for it, and where that fails, as on a full disk, who calls it waits for ever.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._flushed = 0.0
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, step: int) -> None:
        """Add a summary of a step."""
        self._write(Event(step=step, summary=summary))

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
    """The records of a ``metrics.jsonl``; a line that a kill tore is skipped."""
    for record in read_json_lines(path):
        if isinstance(record.get("step"), int) and isinstance(record.get("time"), float):
            yield record
