"""Batch arithmetic: which rows of a step are computed on which rank, in which micro-step."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The sizes of steps from one on."""

    first_step: int
    seq_len: int
    global_batch_size: int
    max_micro_batch_size: int


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic: which of a step's rows are computed where. The only place that knows it.

    A step's ``global_batch_size`` rows are dealt over ``world_size`` ranks in ``gradient_accumulation_steps`` micro-steps
    of ``micro_batch_size`` rows; where that does not come out even, the last rows are empty and weigh nothing.
    """

    global_batch_size: int
    max_micro_batch_size: int
    world_size: int

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps a step."""
        return math.ceil(self._rows_per_rank / self.max_micro_batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Rows a rank and micro-step: the largest allowed, made smaller where that leaves fewer rows empty."""
        return math.ceil(self._rows_per_rank / self.gradient_accumulation_steps)

    @property
    def empty_rows(self) -> int:
        """Rows a step that are computed and weigh nothing."""
        return (
            self.world_size * self.gradient_accumulation_steps * self.micro_batch_size
            - self.global_batch_size
        )

    @property
    def _rows_per_rank(self) -> int:
        return math.ceil(self.global_batch_size / self.world_size)

    def rows(self, rank: int, micro_step: int) -> range:
        """The rows of a step that a rank computes in a micro-step; those from ``global_batch_size`` on are empty."""
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
