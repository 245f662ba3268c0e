"""Judging losses and gradient norms by the recent ones: when to skip a step, when to roll back."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from kantai.distributed.engine import StepResult

MONITORED = ("train/loss", "train/grad_norm")


class LossMonitor:
    """Knows the losses and gradient norms of the last 100 steps that were not skipped.

    Attributes:
        skipped_in_a_row: steps skipped since the last good one.
    """

    HISTORY = 100

    def __init__(self, spike_factor: float | None, max_skipped: int) -> None:
        """Start without a history.

        Args:
            spike_factor: how many times the recent median is too much; None: nothing is.
            max_skipped: steps skipped in a row, from which on going on is of no use.
        """
        self._spike_factor = spike_factor
        self._max_skipped = max_skipped
        self._losses: deque[float] = deque(maxlen=self.HISTORY)
        self._grad_norms: deque[float] = deque(maxlen=self.HISTORY)
        self.skipped_in_a_row = 0

    def restart(self, losses: Iterable[float], grad_norms: Iterable[float]) -> None:
        """Take up the history that a run has at a checkpoint."""
        self._losses = deque(losses, maxlen=self.HISTORY)
        self._grad_norms = deque(grad_norms, maxlen=self.HISTORY)
        self.skipped_in_a_row = 0

    def history(self) -> dict[str, list[float]]:
        """What :meth:`restart` takes up, under the metrics' names."""
        kept = (list(self._losses), list(self._grad_norms))
        return dict(zip(MONITORED, kept, strict=True))

    def limits(self) -> tuple[float, float]:
        """The loss and the gradient norm above which the next step is to be skipped."""
        return self._limit(self._losses), self._limit(self._grad_norms)

    def observe(self, result: StepResult) -> None:
        """Take note of a step."""
        if result.skipped:
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self._losses.append(result.loss)
        if math.isfinite(result.grad_norm):  # fp16 may overflow, which costs that step alone
            self._grad_norms.append(result.grad_norm)

    @property
    def has_gone_bad(self) -> bool:
        """Whether so many steps in a row were skipped that going on is of no use."""
        return self.skipped_in_a_row >= self._max_skipped

    def _limit(self, recent: deque[float]) -> float:
        if self._spike_factor is None or len(recent) < self.HISTORY:
            return math.inf
        return self._spike_factor * statistics.median(recent)
