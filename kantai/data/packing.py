"""Sequences: rows of ids cut from the token stream."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
_PADDED_TO_MULTIPLE_OF = 16  # few distinct shapes, little padding


class Tokens(Protocol):
    """See :class:`kantai.data.shards.Shard`."""

    @property
    def tokens(self) -> npt.NDArray[Any]: ...
    @property
    def boundaries(self) -> npt.NDArray[np.int32]: ...


class Shards(Protocol):
    """See :class:`kantai.data.shards.Split`."""

    documents: Int64s  # of each shard
    tokens: Int64s  # of each shard

    def __getitem__(self, number: int) -> Tokens: ...


class Sequences(Protocol):
    """Sample id -> row of ids. Samples are counted through the shards."""

    samples_per_shard: Int64s
    first_sample: Int64s  # of each shard, and behind the last
    seq_len: int
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

    def __init__(self, shards: Shards, seq_len: int, bos_id: int, pad_id: int) -> None:
        self.shards, self.seq_len, self.bos_id, self.pad_id = shards, seq_len, bos_id, pad_id
        self.content = seq_len - 1
        self.samples_per_shard = np.where(shards.tokens < self.content, 0, -(-shards.tokens // self.content))
        self.first_sample = np.concatenate([[0], np.cumsum(self.samples_per_shard)])

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the sequences, [samples, seq_len]."""
        rows = np.full((len(samples), self.content + 1), self.pad_id, np.int64)
        rows[:, 0] = self.bos_id
        shards = np.searchsorted(self.first_sample, samples, side="right") - 1
        for row, sample, shard in zip(rows, samples.tolist(), shards.tolist(), strict=True):
            if sample >= 0:
                stream = self.shards[shard].tokens
                start = min((sample - int(self.first_sample[shard])) * self.content, len(stream) - self.content)
                row[1:] = stream[start : start + self.content]
        return rows


class Padded:
    """One document a row, ``<s>`` document ``</s>``, cut where it is longer than ``seq_len`` and padded to the batch's longest."""

    has_padding = True

    def __init__(self, shards: Shards, seq_len: int, bos_id: int, eos_id: int, pad_id: int) -> None:
        self.shards, self.seq_len, self.bos_id, self.eos_id, self.pad_id = shards, seq_len, bos_id, eos_id, pad_id
        self.samples_per_shard = shards.documents
        self.first_sample = np.concatenate([[0], np.cumsum(self.samples_per_shard)])

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
        place = sample - int(self.first_sample[shard])
        start, stop = self.shards[shard].boundaries[place : place + 2].tolist()
        return self.shards[shard].tokens[start : min(stop, start + self.seq_len - 1)]
