"""Packing turns documents into rows: full sequences, or one document in each row."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kantai.data.packing import Contiguous, Padded, Sequences
from tests.helpers.shards_in_memory import split_of, streams

BOS, PAD, EOS = 0, 1, 2


def count(sequences: Sequences) -> int:
    return int(sequences.samples_per_shard.sum())


def test_contiguous_cuts_each_shard_into_full_sequences() -> None:
    shards = streams(
        np.arange(10, 20, dtype=np.uint16),
        np.array([30, 31], np.uint16),
        np.arange(40, 44, dtype=np.uint16),
    )
    sequences = Contiguous(shards, 5, BOS, PAD)
    # The second shard is too short for a sequence.
    assert sequences.samples_per_shard.tolist() == [3, 0, 1]
    assert sequences.rows(np.array([3, 0, -1, 2, 1])).tolist() == [
        [BOS, 40, 41, 42, 43],
        [BOS, 10, 11, 12, 13],
        [BOS, PAD, PAD, PAD, PAD],
        [BOS, 16, 17, 18, 19],  # the shard's last sequence starts early to be full
        [BOS, 14, 15, 16, 17],
    ]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), seq_len=st.integers(8, 20))
def test_contiguous_shows_every_token_of_long_shards(lengths: list[int], seq_len: int) -> None:
    starts = [100, *(100 + np.cumsum(lengths))]
    tokens = [
        np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)
    ]
    sequences = Contiguous(streams(*tokens), seq_len, BOS, PAD)
    rows = sequences.rows(np.arange(count(sequences)))
    assert set(rows[:, 1:].flat) == {
        token for stream in tokens if len(stream) >= seq_len - 1 for token in stream.tolist()
    }
    # Few tokens appear twice, and no row mixes shards.
    assert rows[:, 1:].size < sum(lengths) + len(lengths) * seq_len
    assert all(np.array_equal(np.diff(row[1:]), np.ones(seq_len - 2)) for row in rows)


def test_padded_puts_one_document_in_row() -> None:
    first = np.array([10, 11, EOS, 12, EOS], np.uint16), [0, 3, 5]
    second = np.array([*range(20, 40), EOS, EOS, *range(40, 47), EOS], np.uint16), [0, 21, 22, 30]
    sequences = Padded(split_of(first, second), 10, BOS, EOS, PAD)
    assert sequences.samples_per_shard.tolist() == [2, 3]
    assert sequences.rows(np.array([2, 1, -1, 3, 4, 0])).tolist() == [
        [BOS, *range(20, 28), EOS],  # a cut document still ends with </s>
        [BOS, 12, EOS, *[PAD] * 7],
        [BOS, *[PAD] * 9],
        [BOS, EOS, *[PAD] * 8],
        [BOS, *range(40, 47), EOS, PAD],
        [BOS, 10, 11, EOS, *[PAD] * 6],
    ]


@pytest.mark.parametrize(
    ("longest", "length"),
    [(2, 16), (15, 16), (16, 32), (31, 32), (32, 40), (39, 40), (40, 40), (100, 40)],
)
def test_padded_rows_have_few_lengths(longest: int, length: int) -> None:
    tokens = np.array([9] * (longest - 1) + [EOS], np.uint16)
    rows = Padded(streams(tokens), 40, BOS, EOS, PAD).rows(np.array([0, -1]))
    assert rows.shape == (2, length)
    assert rows[0].tolist().count(EOS) == 1 and rows[0, min(longest, length - 1)] == EOS


def test_tokens_that_are_not_shown_or_shown_twice_are_counted() -> None:
    shards = streams(np.arange(5), np.arange(9), np.arange(20), np.arange(4))
    contiguous = Contiguous(shards, 11, 0, 1).shares_unshown_and_repeated()
    assert contiguous == (18 / 38, 0.0)
    shown = Counter[int]()
    names = np.concatenate([np.arange(size) + 100 * shard for shard, size in enumerate([5, 9])])
    named = streams(names[:5], names[5:])
    sequences = Contiguous(named, 5, 0, 1)
    for row in sequences.rows(np.arange(count(sequences))):
        shown.update(row[1:].tolist())
    unshown, repeated = sequences.shares_unshown_and_repeated()
    assert unshown == len(set(names.tolist()) - set(shown)) / 14 == 0
    assert repeated == sum(times == 2 for times in shown.values()) / 14
    assert max(shown.values()) == 2
