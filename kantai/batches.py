"""What does this rank get in this micro-step? Sequences cut from the token stream, dealt to ranks, masked."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kantai.config import BatchPlan

Int64s = npt.NDArray[np.int64]

_PADDED_TO_MULTIPLE_OF = 16  # few distinct shapes, little padding


class Sequences(Protocol):
    """Sample id -> row of ids."""

    samples: int
    has_padding: bool

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the sequences, [samples, length]; a row that is ``<s>`` and padding for a negative sample id."""
        ...


class Contiguous:
    """RoBERTa's full sentences: ``<s>`` and the next ``seq_len - 1`` tokens of a shard, whatever documents they belong to.

    No sequence has padding: a shard's last one starts early enough to be full, so that every token is in at least one.
    A shard shorter than a sequence gives none.
    """

    has_padding = False

    def __init__(self, streams: Sequence[npt.NDArray[Any]], seq_len: int, bos_id: int, pad_id: int) -> None:
        self.streams, self.content, self.bos_id, self.pad_id = streams, seq_len - 1, bos_id, pad_id
        counts = [-(-len(stream) // self.content) if len(stream) >= self.content else 0 for stream in streams]
        self.first_sample = np.array([0, *itertools.accumulate(counts)])
        self.samples = int(self.first_sample[-1])

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the sequences, [samples, seq_len]."""
        rows = np.full((len(samples), self.content + 1), self.pad_id, np.int64)
        rows[:, 0] = self.bos_id
        shards = np.searchsorted(self.first_sample, samples, side="right") - 1
        for row, sample, shard in zip(rows, samples.tolist(), shards.tolist(), strict=True):
            if sample >= 0:
                stream = self.streams[shard]
                start = min((sample - int(self.first_sample[shard])) * self.content, len(stream) - self.content)
                row[1:] = stream[start : start + self.content]
        return rows


class Padded:
    """One document a row, ``<s>`` document ``</s>``, cut where it is longer than ``seq_len`` and padded to the batch's longest."""

    has_padding = True

    def __init__(
        self, shards: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]], seq_len: int, bos_id: int, eos_id: int, pad_id: int
    ) -> None:
        self.shards, self.seq_len, self.bos_id, self.eos_id, self.pad_id = shards, seq_len, bos_id, eos_id, pad_id
        self.first_sample = np.array([0, *itertools.accumulate(len(boundaries) - 1 for _, boundaries in shards)])
        self.samples = int(self.first_sample[-1])

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the documents, [samples, longest, rounded up to a multiple of 16 and at most seq_len]."""
        found = [self._document(sample) for sample in samples.tolist()]
        longest = max(len(document) for document in found) + 1
        length = min(self.seq_len, -(-longest // _PADDED_TO_MULTIPLE_OF) * _PADDED_TO_MULTIPLE_OF)
        rows = np.full((len(samples), length), self.pad_id, np.int64)
        rows[:, 0] = self.bos_id
        for row, document in zip(rows, found, strict=True):
            row[1 : 1 + len(document)] = document
            if len(document) == self.seq_len - 1:
                row[-1] = self.eos_id
        return rows

    def _document(self, sample: int) -> npt.NDArray[Any]:
        if sample < 0:
            return np.zeros(0, np.int64)
        shard = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        tokens, boundaries = self.shards[shard]
        place = sample - int(self.first_sample[shard])
        start, stop = int(boundaries[place]), int(boundaries[place + 1])
        return tokens[start : min(stop, start + self.seq_len - 1)]


@dataclass(frozen=True)
class Batch:
    """What the model is given in one micro-step, and how much work that is."""

    input_ids: Int64s  # [rows, length]
    attention_mask: npt.NDArray[np.bool_] | None  # [rows, length], true for what is attended to; None: all of it
    masked_positions: Int64s  # [rows, most masked]
    labels: Int64s  # [rows, most masked]
    tokens: int  # that are no padding, in rows that are not empty
    attended_pairs: int  # of such tokens, one looking at the other


class Mask(Protocol):
    """See :class:`kantai.masking.MaskedRows`."""

    @property
    def input_ids(self) -> Int64s: ...
    @property
    def masked_positions(self) -> Int64s: ...
    @property
    def labels(self) -> Int64s: ...


@dataclass(frozen=True)
class Batches:
    """The batches of a run as a pure function of (update, micro-step, rank)."""

    sequences: Sequences
    order: Callable[[Int64s], tuple[Int64s, Int64s]]  # positions -> epochs, sample ids (negative: none)
    mask: Callable[[Int64s, Int64s, Int64s], Mask]  # rows, epochs, sample ids -> masked rows
    plan: BatchPlan
    pad_id: int

    def micro_batch(self, update: int, micro_step: int, rank: int) -> Batch:
        """The rows that ``rank`` computes in ``micro_step`` of ``update``, counted from 0."""
        rows = np.array(self.plan.rows(rank, micro_step))
        epochs, samples = self.order(update * self.plan.global_batch_size + rows)
        samples = np.where(rows < self.plan.global_batch_size, samples, -1)
        ids = self.sequences.rows(samples)
        content = ids != self.pad_id
        lengths = content[samples >= 0].sum(1)
        masked = self.mask(ids, epochs, samples)
        return Batch(
            masked.input_ids,
            content if self.sequences.has_padding else None,
            masked.masked_positions,
            masked.labels,
            int(lengths.sum()),
            int((lengths**2).sum()),
        )
