"""Batches: a step's sequences, dealt to ranks and micro-steps, collated into arrays and masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kantai.config.batch_plan import BatchPlan
from kantai.data.masking import IGNORED_LABEL, MaskedRows
from kantai.data.packing import Sequences
from kantai.data.rng import Bools, Int32s, Int64s
from kantai.data.shuffle import NO_SAMPLE, Order

# Few distinct shapes: attention's backward pass spends memory of up to 128 tokens on each start.
_STARTS_TO_MULTIPLE_OF = 64


@dataclass(frozen=True)
class Batch:
    """The model's input in one micro-step, and the work that it makes."""

    input_ids: Int64s  # [rows, length]
    attention_mask: Bools | None  # [rows, length], true where attended to; None: everywhere
    masked_positions: Int64s  # [rows, slots]
    labels: Int64s  # [rows, slots]
    document_starts: Int32s | None  # see :func:`document_starts`; None: rows are not divided
    tokens: int  # without padding and empty rows
    attended_pairs: int  # pairs of those tokens that attend to each other

    def labels_by_position(self) -> Int64s:
        """Labels at the tokens' positions, [rows, length]; ``IGNORED_LABEL`` where unmasked."""
        labels = np.full(self.input_ids.shape, IGNORED_LABEL, np.int64)
        rows, slots = np.nonzero(self.labels != IGNORED_LABEL)
        labels[rows, self.masked_positions[rows, slots]] = self.labels[rows, slots]
        return labels


@dataclass(frozen=True)
class Stage:
    """A part of a run with one sequence length, order and batch size."""

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

    The rows of a step are dealt to the ranks by ascending sample id. The step shows the same rows
    as in shuffled order, and a rank reads from few shards of the window instead of all.

    Args:
        stages: the run's stages in order; the first begins at step 0.
        mask: maps (rows, epochs, sample ids, step) to masked rows.
        pad_id: the id that fills rows.
        isolated_by: the token at which attention and position ids end; None: at the row's end.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mask: Callable[[Int64s, Int64s, Int64s, int], MaskedRows],
        pad_id: int,
        isolated_by: int | None = None,
    ) -> None:
        self.stages = stages
        self.mask = mask
        self.pad_id = pad_id
        self.isolated_by = isolated_by
        self._latest: tuple[int, Int64s, Int64s] | None = None

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def samples(self, step: int) -> tuple[Int64s, Int64s]:
        """Epoch and sample id of all rows of a step, ascending by sample id.

        Empty rows come last; their sample id is negative.
        """
        if self._latest is None or self._latest[0] != step:  # all micro-steps of a step ask
            stage = self.stage_at(step)
            positions = stage.position(step) + np.arange(stage.plan.global_batch_size)
            epochs, samples = stage.order.at(positions)
            ascending = np.lexsort((epochs, samples, samples < 0))
            empty = (0, stage.plan.empty_rows)
            epochs = np.pad(epochs[ascending], empty)
            samples = np.pad(samples[ascending], empty, constant_values=NO_SAMPLE)
            self._latest = step, epochs, samples
        return self._latest[1:]

    def shards(self, step: int, rank: int) -> list[int]:
        """The shards that ``rank`` reads from in a step."""
        stage = self.stage_at(step)
        first = stage.plan.rows(rank, 0)
        last = stage.plan.rows(rank, stage.plan.gradient_accumulation_steps - 1)
        samples = self.samples(step)[1][first.start : last.stop]
        starts = stage.sequences.first_sample
        shards = np.searchsorted(starts, samples[samples >= 0], side="right") - 1
        return [int(shard) for shard in np.unique(shards)]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Batch:
        """The rows that ``rank`` computes in ``micro_step`` of ``step``, both counted from 0."""
        stage = self.stage_at(step)
        rows = stage.plan.rows(rank, micro_step)
        epochs, samples = (part[rows.start : rows.stop] for part in self.samples(step))
        ids = stage.sequences.rows(samples)
        content = ids != self.pad_id
        lengths = content[samples >= 0].sum(1)

        starts = None
        attended_lengths = lengths
        if self.isolated_by is not None:
            starts = document_starts(ids, self.isolated_by).astype(np.int32)
            attended_lengths = np.diff(document_starts(ids[samples >= 0], self.isolated_by))

        masked = self.mask(ids, epochs, samples, step)
        return Batch(
            input_ids=masked.input_ids,
            attention_mask=content if stage.sequences.has_padding else None,
            masked_positions=masked.masked_positions,
            labels=masked.labels,
            document_starts=starts,
            tokens=int(lengths.sum()),
            attended_pairs=int((attended_lengths**2).sum()),
        )


def document_starts(rows: Int64s, eos_id: int) -> Int64s:
    """Where documents, or their parts, begin in rows laid end to end.

    A document begins at a row's start and after every ``</s>``.

    Args:
        rows: ids, [rows, length].

    Returns:
        Ascending starts, then the number of all tokens once or more, [starts], padded to a
        multiple of 64.
    """
    begins = np.ones(rows.shape, bool)
    begins[:, 1:] = rows[:, :-1] == eos_id
    starts = np.flatnonzero(begins)
    filling = _STARTS_TO_MULTIPLE_OF - len(starts) % _STARTS_TO_MULTIPLE_OF
    return np.pad(starts, (0, filling), constant_values=rows.size)
