"""Checkpoints that training does not wait for: copied at once, written by a thread."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kantai.checkpoint.state import Snapshot
from kantai.checkpoint.store import HELD_OUT_LOSS, CheckpointStore, refuse_full_disk
from kantai.config.schema import CheckpointConfig
from kantai.distributed.engine import Engine
from kantai.errors import UserError
from kantai.storage.atomic import verify

_ROOM = 1.05  # over the tensors: names, and what other writers need
_MIN_INTERVAL_SECONDS = 600.0


class Checkpointer:
    """Makes one checkpoint at a time. All ranks call its methods together, but ``is_written``.

    Attributes:
        step: of the last checkpoint that was saved or gone on from.
        stall_seconds: time that training stood still for it.
        write_seconds: time that this rank took to write it meanwhile.
    """

    def __init__(self, engine: Engine, store: CheckpointStore, config: CheckpointConfig) -> None:
        self.step = 0
        self.stall_seconds = 0.0
        self.write_seconds = 0.0
        self._engine = engine
        self._store = store
        self._every_steps = config.every_steps
        self._keep = config.keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[tuple[str, dict[str, Any]]] | None = None
        self._meta: dict[str, Any] = {}
        self._saved_at = time.monotonic()

    def is_due(self, done: int, *, is_scored: bool) -> bool:
        """Whether a checkpoint is to be saved after ``done`` steps. Ranks' clocks may differ.

        Args:
            is_scored: whether the held-out split is evaluated at this step.
        """
        if self._every_steps is not None:
            return done % self._every_steps == 0
        interval = interval_seconds(self.stall_seconds, self.write_seconds, is_scored=is_scored)
        return time.monotonic() - self._saved_at >= interval

    def save(self, step: int, *, since: float, **meta: Any) -> None:
        """Copy the state after ``step`` steps, and have it written.

        Args:
            since: when training began to stand still for it, by the monotonic clock.
            meta: for the manifest; rank 0's counts.

        Raises:
            UserError: no room, or a later start of the run has superseded this one.
        """
        self.publish()
        snapshot = self._engine.snapshot()
        needed = int(sum(self._engine.from_all(snapshot.size_bytes)) * _ROOM)
        folder = Path(self._engine.on_main(lambda: self._begin(step, needed)))
        self.step = step
        self._meta = meta
        self._written = self._thread.submit(self._write_snapshot, snapshot, folder)
        self._saved_at = time.monotonic()
        self.stall_seconds = self._saved_at - since

    def score(self, step: int, held_out_loss: float) -> None:
        """Note the held-out loss of the checkpoint of ``step``, if there is one.

        That of a start which was asked to stop is published, and scored by the next start.
        """
        if self.step != step or not math.isfinite(held_out_loss):
            return
        if self._written is not None:
            self._meta[HELD_OUT_LOSS] = held_out_loss
        else:
            self._engine.on_main(lambda: self._store.score(step, held_out_loss))

    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint waits to be published."""
        return self._written is not None and self._written.done()

    def publish(self) -> bool:
        """Wait for all ranks' parts, publish the checkpoint if there is one; prune others.

        Raises:
            UserError: the checkpoint could not be written. Earlier ones are as they were.
        """
        if self._written is None:
            return False
        start = time.monotonic()
        written = self._written
        self._written = None
        error = written.exception()
        errors = self._engine.from_all("" if error is None else f"{type(error).__name__}: {error}")
        for rank, text in enumerate(errors):
            if text:
                raise UserError(
                    f"checkpoint {self.step} could not be written by rank {rank} ({text}); the "
                    "one before is good"
                )
        files = dict(self._engine.from_all(written.result()))
        self._engine.on_main(lambda: self._publish(files))
        self.stall_seconds += time.monotonic() - start
        return True

    def _begin(self, step: int, needed_bytes: int) -> str:
        refuse_full_disk(self._store.folder, needed_bytes)
        return str(self._store.begin(step))

    def _write_snapshot(self, snapshot: Snapshot, folder: Path) -> tuple[str, dict[str, Any]]:
        start = time.monotonic()
        entry = snapshot.save(folder)
        self.write_seconds = time.monotonic() - start
        return entry

    def _publish(self, files: dict[str, dict[str, Any]]) -> None:
        self._store.publish(self.step, files, **self._meta)
        verify(self._store.path(self.step), hashes=False)  # every rank has read its part back
        self._store.prune(self._keep)


def interval_seconds(
    stall_seconds: float, write_seconds: float, *, is_scored: bool = False
) -> float:
    """Time from one checkpoint to the next: ten minutes, or more where checkpoints are costly.

    Training stands still for at most 2 % of the time, and the disk is busy for at most a fifth of
    it. With a day between failures and a checkpoint that costs a second, the best interval would
    be 7 minutes (Young 1974): it loses 0.55 % of the time, and ten minutes lose 0.57 %.

    At an evaluation, a checkpoint need not wait for the ten minutes: only those that are scored can
    be the best one.
    """
    least = 0.0 if is_scored else _MIN_INTERVAL_SECONDS
    return max(least, 50 * stall_seconds, 5 * write_seconds)
