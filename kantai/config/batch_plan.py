"""Batch arithmetic: which rank computes which rows of a step, and in which micro-step."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The batch sizes from one step on."""

    first_step: int
    seq_len: int
    global_batch_size: int
    max_micro_batch_size: int


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The division of a step's rows among ranks and micro-steps. No other place computes it.

    Each of ``world_size`` ranks computes ``gradient_accumulation_steps`` micro-steps of
    ``micro_batch_size`` rows. Where the division of ``global_batch_size`` rows leaves a remainder,
    the last rows are empty and weigh nothing.
    """

    global_batch_size: int
    max_micro_batch_size: int
    world_size: int

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps in a step."""
        return math.ceil(self._rows_per_rank / self.max_micro_batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a rank in a micro-step: at most the maximum, fewer if that saves empty rows."""
        return math.ceil(self._rows_per_rank / self.gradient_accumulation_steps)

    @property
    def empty_rows(self) -> int:
        """Rows of a step that are computed and weigh nothing."""
        rows_per_rank = self.gradient_accumulation_steps * self.micro_batch_size
        return self.world_size * rows_per_rank - self.global_batch_size

    @property
    def _rows_per_rank(self) -> int:
        return math.ceil(self.global_batch_size / self.world_size)

    def rows(self, rank: int, micro_step: int) -> range:
        """The rows that a rank computes in a micro-step; from ``global_batch_size`` on, empty."""
        start = (rank * self.gradient_accumulation_steps + micro_step) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def __str__(self) -> str:
        text = (
            f"{self.global_batch_size} sequences a step = {self.world_size} ranks x "
            f"{self.gradient_accumulation_steps} micro-steps x {self.micro_batch_size}"
        )
        if self.empty_rows:
            share = self.empty_rows / (self.global_batch_size + self.empty_rows)
            text += f", {self.empty_rows} of them empty ({share:.1%} wasted)"
        return text
