"""Agreement of all ranks, after every step, on what only some of them know."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.signals import StopSignals
from kantai.distributed.engine import Engine


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    stop: bool  # the run
    save: bool  # a checkpoint
    all_written: bool  # every rank's part of a checkpoint waits to be published
    is_finite: bool  # all ranks' weights and moments are


def stopped_message(reason: str, trained_seconds: float, *, done: int, max_steps: int) -> str:
    """Say that a run stops before its last step.

    ``slurm/pretrain.sbatch`` reads the reason and the seconds from it, and judges by them whether
    the start paid.
    """
    return (
        f"asked to stop ({reason}) after {trained_seconds:.0f} s of training: saved step {done} of "
        f"{max_steps}; the same command goes on from there"
    )


class StopCoordinator:
    """Has all ranks agree to stop, to save, and to publish a checkpoint.

    A signal may come to one rank alone, files are looked for by rank 0, and clocks differ. A rank
    that decided alone would leave the others waiting in a collective.
    """

    def __init__(self, run_dir: Path, engine: Engine, store: CheckpointStore) -> None:
        self._engine = engine
        self._store = store
        self._signals = StopSignals(run_dir, watch_files=engine.rank_info.is_main)
        self._own_reason: str | None = None

    def agree(self, *, seconds_needed: float, save_is_due: bool, is_written: bool) -> Decision:
        """Exchange what the ranks know; all of them call this after every step.

        Args:
            seconds_needed: to do another step, and to save.
            save_is_due: rank 0's counts.

        Raises:
            UserError: a later start of the run has superseded this one.
        """
        is_main = self._engine.rank_info.is_main
        self._own_reason = self._signals.stop_reason(seconds_needed)
        flags = [
            self._own_reason is not None,
            is_main and (save_is_due or self._signals.save_requested()),
            is_written,
            is_main and self._store.is_superseded(),
        ]
        own = torch.tensor(flags, dtype=torch.float32, device=self._engine.device)
        poison = 1 - self._engine.is_finite().float()
        sums = self._engine.sum_over_ranks(torch.cat([own, poison.view(1)]))
        stops, saves, written, superseded, poisoned = sums.tolist()
        if superseded:
            raise self._store.superseded()
        all_written = written == self._engine.rank_info.world_size
        return Decision(bool(stops), bool(saves), all_written, not poisoned)

    def acknowledge(self, *, stop: bool) -> None:
        """Remove the files that asked for what is now being done."""
        if self._engine.rank_info.is_main:
            self._signals.acknowledge(stop=stop)

    def reason(self) -> str:
        """Why the run stops; all ranks call this together."""
        reasons = self._engine.from_all(self._own_reason)
        return next(filter(None, reasons))
