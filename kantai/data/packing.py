"""Packing: rows of ids cut from the token stream, full sequences or one document a row."""

from typing import Protocol

import numpy as np

from kantai.data.rng import Int64s, TokenIds
from kantai.data.shards import Split

_PADDED_TO_MULTIPLE_OF = 16  # few distinct shapes, little padding
_MAX_SHARDS_READ = 64


class Sequences(Protocol):
    """Rows of ids by sample id. Samples are numbered through the shards."""

    samples_per_shard: Int64s
    first_sample: Int64s  # of each shard; one more entry holds the number of samples
    seq_len: int
    has_padding: bool

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the sequences, [samples, length].

        A negative sample id gives a row of ``<s>`` and padding.
        """
        ...

    def shares_unshown_and_repeated(self) -> tuple[float, float]:
        """Shares of the tokens that an epoch does not show, and that it shows twice."""
        ...


def sampled_lengths(shards: Split) -> Int64s:
    """Tokens of the documents of all shards, or of 64 shards from the first to the last."""
    spread = np.linspace(0, len(shards) - 1, min(len(shards), _MAX_SHARDS_READ))
    read = np.unique(spread.astype(np.int64)).tolist()
    return np.concatenate([np.zeros(0, np.int64), *(shards[number].lengths for number in read)])


class Contiguous:
    """RoBERTa's full sentences: ``<s>`` and the next ``seq_len - 1`` tokens of a shard.

    Sequences run across document ends and have no padding. A shard's last sequence starts early
    enough to be full, so that every token is in at least one. A shard shorter than a sequence
    gives none.
    """

    has_padding = False

    def __init__(self, shards: Split, seq_len: int, bos_id: int, pad_id: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.content = seq_len - 1
        sequences = -(-shards.tokens // self.content)
        self.samples_per_shard = np.where(shards.tokens < self.content, 0, sequences)
        self.first_sample = np.concatenate([[0], np.cumsum(self.samples_per_shard)])

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the sequences, [samples, seq_len]."""
        rows = np.full((len(samples), self.seq_len), self.pad_id, np.int64)
        rows[:, 0] = self.bos_id
        shards = np.searchsorted(self.first_sample, samples, side="right") - 1
        for row, sample, shard in zip(rows, samples.tolist(), shards.tolist(), strict=True):
            if sample >= 0:
                stream = self.shards[shard].tokens
                start = (sample - int(self.first_sample[shard])) * self.content
                start = min(start, len(stream) - self.content)
                row[1:] = stream[start : start + self.content]
        return rows

    def shares_unshown_and_repeated(self) -> tuple[float, float]:
        """Shares of the tokens in shards shorter than a sequence, and in two sequences."""
        tokens = self.shards.tokens
        shown = self.samples_per_shard * self.content
        unshown = tokens[shown == 0].sum()
        repeated = (shown - tokens)[shown > 0].sum()
        total = max(1, int(tokens.sum()))
        return float(unshown / total), float(repeated / total)


class Padded:
    """One document a row: ``<s>`` document ``</s>``, cut at ``seq_len`` or padded."""

    has_padding = True

    def __init__(self, shards: Split, seq_len: int, bos_id: int, eos_id: int, pad_id: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.samples_per_shard = shards.documents
        self.first_sample = np.concatenate([[0], np.cumsum(self.samples_per_shard)])

    def rows(self, samples: Int64s) -> Int64s:
        """Ids of the documents, [samples, length].

        The length is the longest document's, rounded up to a multiple of 16, at most ``seq_len``.
        """
        documents = [self._document(sample) for sample in samples.tolist()]
        longest = max(len(document) for document in documents) + 1
        rounded_up = -(-longest // _PADDED_TO_MULTIPLE_OF) * _PADDED_TO_MULTIPLE_OF
        length = min(self.seq_len, rounded_up)
        rows = np.full((len(samples), length), self.pad_id, np.int64)
        rows[:, 0] = self.bos_id
        for row, document in zip(rows, documents, strict=True):
            row[1 : 1 + len(document)] = document
            if len(document) == self.seq_len - 1:
                row[-1] = self.eos_id
        return rows

    def shares_unshown_and_repeated(self) -> tuple[float, float]:
        """The share of the tokens beyond ``seq_len`` in their documents, and 0."""
        lengths = sampled_lengths(self.shards)
        unshown = np.maximum(lengths - self.seq_len + 1, 0).sum()
        return float(unshown / max(1, int(lengths.sum()))), 0.0

    def _document(self, sample: int) -> TokenIds:
        if sample < 0:
            return np.zeros(0, np.int64)
        shard = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        place = sample - int(self.first_sample[shard])
        start, stop = self.shards[shard].boundaries[place : place + 2].tolist()
        return self.shards[shard].tokens[start : min(stop, start + self.seq_len - 1)]
