"""How is a checkpoint made without training waiting for the disk? Copied to host memory at once, written by a thread, published later."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kantai.checkpoint.store import CheckpointStore, refuse_full_disk
from kantai.distributed.engine import Engine
from kantai.errors import UserError
from kantai.storage.atomic import verify

_ROOM = 1.05  # over the tensors: names, and what other writers need
_FIRST_INTERVAL_SECONDS = 600.0  # until it is known what saving costs


class Checkpointer:
    """Makes one checkpoint at a time; every method but ``is_written`` is called by all ranks together.

    Attributes:
        step: of the last checkpoint.
        stall_seconds: that it held training up.
        slowdown_seconds: by which steps took longer while it was written.
        write_seconds: that writing it took on this rank.
    """

    def __init__(self, engine: Engine, store: CheckpointStore, keep: int) -> None:
        self.engine, self.store, self.keep = engine, store, keep
        self.stall_seconds = self.slowdown_seconds = self.write_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[tuple[str, dict[str, Any]]] | None = None
        self.step, self._meta = 0, dict[str, Any]()
        self._saved_at = time.monotonic()

    def start(self, step: int, *, since: float, **meta: Any) -> None:
        """Copy the state after ``step`` steps and have it written.

        Args:
            since: when training was held up for it, by the monotonic clock.
            meta: for the manifest; rank 0's counts.

        Raises:
            UserError: no room, or a later start of the run has superseded this one.
        """
        self.finish()
        snapshot = self.engine.snapshot()
        needed = sum(self.engine.from_all(snapshot.size_bytes))
        folder = self.engine.on_main(lambda: self._stage(step, int(needed * _ROOM)))
        self.step, self._meta = step, meta
        self._written = self._thread.submit(self._write, snapshot, folder)
        self._saved_at = time.monotonic()
        self.stall_seconds, self.slowdown_seconds = self._saved_at - since, 0.0

    def step_took(self, seconds: float, usually: float) -> None:
        """Take note of a step: while a checkpoint is written, steps may have fewer cores, or a busy disk."""
        if self._written is not None and not self._written.done():
            self.slowdown_seconds += max(0.0, seconds - usually)

    def as_metrics(self) -> dict[str, float]:
        """As metrics."""
        return {f"checkpoint/{name}_seconds": getattr(self, f"{name}_seconds") for name in ("stall", "slowdown", "write")}

    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint waits to be published."""
        return self._written is not None and self._written.done()

    def finish(self) -> bool:
        """Wait for all ranks' parts, publish the checkpoint, and remove the oldest; False when there is none.

        Raises:
            UserError: it could not be written. What was saved before is as it was.
        """
        if self._written is None:
            return False
        start = time.monotonic()
        written, self._written = self._written, None
        error = written.exception()
        errors = self.engine.from_all("" if error is None else f"{type(error).__name__}: {error}")
        for rank, text in enumerate(errors):
            if text:
                raise UserError(f"checkpoint {self.step} could not be written by rank {rank} ({text}); the one before is good")
        files = dict(self.engine.from_all(written.result()))
        self.engine.on_main(lambda: self._publish(files))
        self.stall_seconds += time.monotonic() - start
        return True

    def seconds_since(self) -> float:
        """Since the last checkpoint."""
        return time.monotonic() - self._saved_at

    def interval_seconds(self, mtbf_hours: float, job_hours: float) -> float:
        """How long after a checkpoint the next is due; the end of a job counts as a failure, should there be no time to save before it."""
        cost = self.stall_seconds + self.slowdown_seconds
        if not cost:
            return _FIRST_INTERVAL_SECONDS
        return max(self.write_seconds, best_interval_seconds(cost, 3600 / (1 / mtbf_hours + 1 / job_hours)))

    def _stage(self, step: int, needed_bytes: int) -> Any:
        refuse_full_disk(self.store.folder, needed_bytes)
        return self.store.begin(step)

    def _write(self, snapshot: Any, folder: Any) -> tuple[str, dict[str, Any]]:
        start = time.monotonic()
        part: tuple[str, dict[str, Any]] = snapshot.write(folder)
        self.write_seconds = time.monotonic() - start
        return part

    def _publish(self, files: dict[str, dict[str, Any]]) -> None:
        self.store.publish(self.step, files, **self._meta)
        verify(self.store.path(self.step), hashes=False)  # every rank has read its part back
        self.store.prune(self.keep)


def best_interval_seconds(cost_seconds: float, mtbf_seconds: float) -> float:
    """How often saving costs least: what it costs is then as much as what failures throw away.

    Young (1974); Daly (2006), equation 13, to first order.
    """
    return math.sqrt(2 * cost_seconds * mtbf_seconds)
