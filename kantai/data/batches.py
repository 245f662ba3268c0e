"""What does this rank get in this micro-step? Sequences cut from the token stream, dealt to ranks, masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kantai.config.batch_plan import BatchPlan
from kantai.data.packing import Int64s, Sequences

_STARTS_TO_MULTIPLE_OF = 64  # few distinct shapes; in attention's backward pass each costs memory of up to 128 tokens


class Order(Protocol):
    """Which sample comes when; see :mod:`kantai.data.shuffle`."""

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position; the id is negative where there is none."""
        ...


@dataclass(frozen=True)
class Batch:
    """What the model is given in one micro-step, and how much work that is."""

    input_ids: Int64s  # [rows, length]
    attention_mask: npt.NDArray[np.bool_] | None  # [rows, length], true for what is attended to; None: all of it
    masked_positions: Int64s  # [rows, most masked]
    labels: Int64s  # [rows, most masked]
    document_starts: npt.NDArray[np.int32] | None  # of the function of that name; None: rows are not divided
    tokens: int  # that are no padding, in rows that are not empty
    attended_pairs: int  # of such tokens, one looking at the other


class Mask(Protocol):
    """See :class:`kantai.data.masking.MaskedRows`."""

    @property
    def input_ids(self) -> Int64s: ...
    @property
    def masked_positions(self) -> Int64s: ...
    @property
    def labels(self) -> Int64s: ...


@dataclass(frozen=True)
class Stage:
    """A part of a run: which sequences it shows, in which order, how many a step."""

    first_step: int
    first_position: int  # in the order
    plan: BatchPlan
    sequences: Sequences
    order: Order

    def position(self, step: int) -> int:
        """The position in the order at which a step begins."""
        return self.first_position + (step - self.first_step) * self.plan.global_batch_size


class Batches:
    """The batches of a run as a pure function of (step, micro-step, rank).

    The rows of a step are dealt in the order of their sample ids, not of the shuffle: what a step shows is the same, and a rank
    reads from few shards of a window instead of all.

    Args:
        stages: of the run, in order; the first begins at step 0.
        mask: rows, epochs, sample ids, step -> masked rows.
        pad_id: fills rows.
        isolated_by: the token at which attention and position ids end; None: they go on to the row's end.
    """

    def __init__(
        self, stages: Sequence[Stage], mask: Callable[[Int64s, Int64s, Int64s, int], Mask], pad_id: int, isolated_by: int | None = None
    ) -> None:
        self.stages, self.mask, self.pad_id, self.isolated_by = stages, mask, pad_id, isolated_by
        self._latest: tuple[int, Int64s, Int64s] | None = None

    def stage_at(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def samples(self, step: int) -> tuple[Int64s, Int64s]:
        """Epoch and sample id of all rows of a step, empty ones included: ascending, and then negative where there is none."""
        if self._latest is None or self._latest[0] != step:  # micro-steps ask one after another
            stage = self.stage_at(step)
            epochs, samples = stage.order.at(stage.position(step) + np.arange(stage.plan.global_batch_size))
            dealt = np.lexsort((epochs, samples, samples < 0))
            empty = (0, stage.plan.empty_rows)
            self._latest = step, np.pad(epochs[dealt], empty), np.pad(samples[dealt], empty, constant_values=-1)
        return self._latest[1:]

    def shards(self, step: int, rank: int) -> list[int]:
        """The shards that ``rank`` reads from in a step."""
        stage = self.stage_at(step)
        rows = [stage.plan.rows(rank, micro_step) for micro_step in range(stage.plan.gradient_accumulation_steps)]
        samples = self.samples(step)[1][rows[0].start : rows[-1].stop]
        found = np.searchsorted(stage.sequences.first_sample, samples[samples >= 0], side="right") - 1
        return [int(shard) for shard in np.unique(found)]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Batch:
        """The rows that ``rank`` computes in ``micro_step`` of ``step``, counted from 0."""
        stage = self.stage_at(step)
        rows = stage.plan.rows(rank, micro_step)
        epochs, samples = (part[rows.start : rows.stop] for part in self.samples(step))
        ids = stage.sequences.rows(samples)
        content = ids != self.pad_id
        lengths = content[samples >= 0].sum(1)
        spans, starts = lengths, None
        if self.isolated_by is not None:
            spans = np.diff(document_starts(ids[samples >= 0], self.isolated_by))
            starts = document_starts(ids, self.isolated_by).astype(np.int32)
        masked = self.mask(ids, epochs, samples, step)
        return Batch(
            masked.input_ids,
            content if stage.sequences.has_padding else None,
            masked.masked_positions,
            masked.labels,
            starts,
            int(lengths.sum()),
            int((spans**2).sum()),
        )


def document_starts(rows: Int64s, eos_id: int) -> Int64s:
    """Where documents, or their parts, begin in rows laid end to end: at a row's start and behind every ``</s>``.

    Args:
        rows: ids, [rows, length].

    Returns:
        [documents + 1, rounded up to a multiple of 64]: ascending, with the number of all tokens once or more at the end.
    """
    begins = np.ones(rows.shape, bool)
    begins[:, 1:] = rows[:, :-1] == eos_id
    starts = np.flatnonzero(begins)
    filling = _STARTS_TO_MULTIPLE_OF - len(starts) % _STARTS_TO_MULTIPLE_OF
    return np.pad(starts, (0, filling), constant_values=rows.size)
