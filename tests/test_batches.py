"""What an update is shown: the right tokens, and the same rows on any number of ranks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from memory import split_of, streams

from kantai.batches import Batch, Batches, Contiguous, Order, Padded, Sequences, Stage
from kantai.config import BatchPlan
from kantai.masking import IGNORED_LABEL, MaskedRows, Masker
from kantai.order import Sequential, Shuffled
from kantai.shards import open_shards
from kantai.tokenizer import load_tokenizer

BOS, PAD, EOS, MASK = 0, 1, 2, 4
SPECIAL = (0, 1, 2, 3, 4)

# A row as the model sees it, without padding: its ids, and label by masked position.
Row = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


def masker(vocab_size: int = 1000, ratio: float = 0.15) -> Masker:
    return Masker(ratio, 0.8, 0.1, vocab_size, MASK, SPECIAL, seed=11)


def shuffled(sequences: Sequences, seed: int) -> Shuffled:
    return Shuffled(sequences.samples_per_shard, 2, seed)


def count(sequences: Sequences) -> int:
    return int(sequences.samples_per_shard.sum())


def batches_of(sequences: Sequences, order: Order, mask: Masker, plan: BatchPlan) -> Batches:
    """A run of one stage."""
    return Batches([Stage(0, 0, plan, sequences, order)], mask, PAD)


def rows_of(batch: Batch | MaskedRows) -> list[Row]:
    rows = []
    for ids, positions, labels in zip(batch.input_ids.tolist(), batch.masked_positions.tolist(), batch.labels.tolist(), strict=True):
        while ids[-1] == PAD:
            ids.pop()
        answers = sorted((position, label) for position, label in zip(positions, labels, strict=True) if label != IGNORED_LABEL)
        rows.append((tuple(ids), tuple(answers)))
    return rows


@given(global_batch_size=st.integers(1, 300), micro_batch_size=st.integers(1, 80), world_size=st.integers(1, 40))
@example(8192, 64, 7)
@example(1, 1, 8)
def test_plan_deals_every_row_once_and_computes_as_few_empty_ones_as_it_can(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    plan = BatchPlan(global_batch_size, micro_batch_size, world_size)
    steps, micro = plan.gradient_accumulation_steps, plan.micro_batch_size
    dealt = [row for rank in range(world_size) for step in range(steps) for row in plan.rows(rank, step)]
    assert dealt == list(range(global_batch_size + plan.empty_rows))
    assert all(len(plan.rows(rank, step)) == micro <= micro_batch_size for rank in range(world_size) for step in range(steps))
    assert world_size * (steps - 1) * micro_batch_size < global_batch_size  # one micro-step fewer would not hold the rows
    assert world_size * steps * (micro - 1) < global_batch_size  # nor would smaller micro-batches
    assert (f"{plan.empty_rows} of them empty" in str(plan)) == (plan.empty_rows > 0)


def test_plan_says_what_is_wasted() -> None:
    assert str(BatchPlan(256, 32, 4)) == "256 sequences an update = 4 ranks x 2 micro-steps x 32"
    assert str(BatchPlan(256, 32, 7)) == "256 sequences an update = 7 ranks x 2 micro-steps x 19, 10 of them empty (3.8% wasted)"


def test_contiguous_cuts_each_shard_into_full_sequences() -> None:
    shards = streams(np.arange(10, 20, dtype=np.uint16), np.array([30, 31], np.uint16), np.arange(40, 44, dtype=np.uint16))
    sequences = Contiguous(shards, 5, BOS, PAD)
    assert sequences.samples_per_shard.tolist() == [
        3,
        0,
        1,
    ]  # three of the first shard, none of the second, which is too short, one of the third
    assert sequences.rows(np.array([3, 0, -1, 2, 1])).tolist() == [
        [BOS, 40, 41, 42, 43],
        [BOS, 10, 11, 12, 13],
        [BOS, PAD, PAD, PAD, PAD],
        [BOS, 16, 17, 18, 19],  # the shard's last: starts early enough to be full
        [BOS, 14, 15, 16, 17],
    ]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), seq_len=st.integers(8, 20))
def test_contiguous_shows_every_token_of_shards_that_fill_a_sequence(lengths: list[int], seq_len: int) -> None:
    starts = [100, *(100 + np.cumsum(lengths))]
    tokens = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    sequences = Contiguous(streams(*tokens), seq_len, BOS, PAD)
    rows = sequences.rows(np.arange(count(sequences)))
    assert set(rows[:, 1:].flat) == {token for stream in tokens if len(stream) >= seq_len - 1 for token in stream.tolist()}
    assert rows[:, 1:].size < sum(lengths) + len(lengths) * seq_len  # and few of them twice
    assert all(np.array_equal(np.diff(row[1:]), np.ones(seq_len - 2)) for row in rows)  # no row mixes shards


def test_padded_gives_a_document_a_row() -> None:
    first = np.array([10, 11, EOS, 12, EOS], np.uint16), [0, 3, 5]
    second = np.array([*range(20, 40), EOS, EOS, *range(40, 47), EOS], np.uint16), [0, 21, 22, 30]
    sequences = Padded(split_of(first, second), 10, BOS, EOS, PAD)
    assert sequences.samples_per_shard.tolist() == [2, 3]
    assert sequences.rows(np.array([2, 1, -1, 3, 4, 0])).tolist() == [
        [BOS, *range(20, 28), EOS],  # cut, and still ended
        [BOS, 12, EOS, *[PAD] * 7],
        [BOS, *[PAD] * 9],
        [BOS, EOS, *[PAD] * 8],
        [BOS, *range(40, 47), EOS, PAD],
        [BOS, 10, 11, EOS, *[PAD] * 6],
    ]


@pytest.mark.parametrize(("longest", "length"), [(2, 16), (15, 16), (16, 32), (31, 32), (32, 40), (39, 40), (40, 40), (100, 40)])
def test_padded_rows_have_few_lengths(longest: int, length: int) -> None:
    tokens = np.array([9] * (longest - 1) + [EOS], np.uint16)
    rows = Padded(streams(tokens), 40, BOS, EOS, PAD).rows(np.array([0, -1]))
    assert rows.shape == (2, length)
    assert rows[0].tolist().count(EOS) == 1 and rows[0, min(longest, length - 1)] == EOS


def sequences_of(kind: str, shards_dir: Path, tokenizer_dir: Path) -> tuple[Sequences, int]:
    vocabulary, shards = load_tokenizer(tokenizer_dir), open_shards(shards_dir).splits["held_out"]
    if kind == "padded":
        return Padded(shards, 64, BOS, EOS, PAD), vocabulary.size
    return Contiguous(shards, 64, BOS, PAD), vocabulary.size


@pytest.mark.parametrize("kind", ["contiguous", "padded"])
def test_an_update_is_the_same_on_any_number_of_ranks_in_any_micro_batches(kind: str, shards_dir: Path, tokenizer_dir: Path) -> None:
    sequences, vocab_size = sequences_of(kind, shards_dir, tokenizer_dir)
    order = shuffled(sequences, 3)

    def update(number: int, world_size: int, micro_batch_size: int) -> tuple[list[Row], list[Row], int, int]:
        """Rows of an update in their order, its empty rows, tokens, pairs."""
        plan = BatchPlan(12, micro_batch_size, world_size)
        batches = batches_of(sequences, order, masker(vocab_size), plan)
        dealt = [
            batches.micro_batch(number, step, rank)
            for rank, step in itertools.product(range(world_size), range(plan.gradient_accumulation_steps))
        ]
        rows = [row for batch in dealt for row in rows_of(batch)]
        return rows[:12], rows[12:], sum(batch.tokens for batch in dealt), sum(batch.attended_pairs for batch in dealt)

    seen = set()
    for number in (0, 1, (count(sequences) - 1) // 12, 10**6):  # the third holds the end of an epoch
        expected, empty, tokens, pairs = update(number, 1, 12)
        epochs, samples = order.at(number * 12 + np.arange(12))
        assert sorted(expected) == sorted(rows_of(masker(vocab_size)(sequences.rows(samples), epochs, samples, number))) and not empty
        assert sum(len(answers) for _, answers in expected) > 20
        assert (tokens, pairs) == (sum(len(ids) for ids, _ in expected), sum(len(ids) ** 2 for ids, _ in expected))
        seen.add(tuple(expected))
        for world_size, micro_batch_size in itertools.product((1, 2, 3, 5), (1, 2, 5, 12)):
            rows, empty, *work = update(number, world_size, micro_batch_size)
            assert rows == expected
            assert empty == [((BOS,), ())] * BatchPlan(12, micro_batch_size, world_size).empty_rows
            assert work == [tokens, pairs]
    assert len(seen) == 4


def test_an_epoch_shows_every_sequence_once(shards_dir: Path, tokenizer_dir: Path) -> None:
    sequences, vocab_size = sequences_of("contiguous", shards_dir, tokenizer_dir)
    plan = BatchPlan(8, 3, 2)
    batches = batches_of(sequences, shuffled(sequences, 0), masker(vocab_size), plan)
    shown: list[list[tuple[int, ...]]] = [[], []]  # by epoch
    for update in range(-(-count(sequences) // 8)):
        epochs, samples = batches.samples(update)
        dealt = [batches.micro_batch(update, step, rank) for rank in range(2) for step in range(plan.gradient_accumulation_steps)]
        for epoch, sample, (ids, answers) in zip(epochs, samples, (row for batch in dealt for row in rows_of(batch)), strict=True):
            original = np.array(ids)
            original[[position for position, _ in answers]] = [label for _, label in answers]
            shown[epoch] += [tuple(original.tolist())] if sample >= 0 else []
    assert sorted(shown[0]) == sorted(map(tuple, sequences.rows(np.arange(count(sequences))).tolist()))


def test_a_rank_reads_from_few_shards_of_a_window() -> None:
    """Rows are dealt in the order of their samples: two ranks read from half of the shards each, and one more."""
    sequences = Contiguous(streams(*(np.arange(100, 1000) for _ in range(16))), 10, BOS, PAD)
    batches = batches_of(sequences, Shuffled(sequences.samples_per_shard, 16, 0), masker(), BatchPlan(160, 8, 2))
    for update in range(10):
        read = [batches.shards(update, rank) for rank in range(2)]
        assert set(read[0]) | set(read[1]) == set(range(16)) and all(len(shards) <= 10 for shards in read)
        for rank, shards in enumerate(read):
            steps = range(batches.stage(update).plan.gradient_accumulation_steps)
            ids = np.concatenate([batches.micro_batch(update, step, rank).input_ids for step in steps])
            assert len(ids) == 80 and shards == sorted(shards)


def test_evaluation_ends_with_empty_rows() -> None:
    sequences = Contiguous(streams(np.arange(100, 140)), 9, BOS, PAD)
    batches = batches_of(sequences, Sequential(count(sequences)), masker(ratio=0.5), BatchPlan(4, 4, 1))
    last = batches.micro_batch(1, 0, 0)
    assert count(sequences) == 5
    assert (last.labels[0] != IGNORED_LABEL).sum() == 4 and (last.labels[1:] == IGNORED_LABEL).all()
    assert last.input_ids[1:].tolist() == [[BOS, *[PAD] * 8]] * 3
    assert (last.tokens, last.attended_pairs) == (9, 81)


def test_attention_mask_is_there_where_padding_is() -> None:
    plan, order = BatchPlan(3, 4, 1), Sequential(2)
    full = batches_of(Contiguous(streams(np.arange(100, 120)), 11, BOS, PAD), order, masker(ratio=0.5), plan).micro_batch(0, 0, 0)
    assert full.attention_mask is None

    documents = split_of((np.array([10, 11, 12, EOS, 13, EOS], np.uint16), [0, 4, 6]))
    padded = batches_of(Padded(documents, 64, BOS, EOS, PAD), order, masker(ratio=0.5), plan).micro_batch(0, 0, 0)
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [[True] * 5 + [False] * 11, [True] * 3 + [False] * 13, [True] + [False] * 15]
    assert (padded.tokens, padded.attended_pairs) == (5 + 3, 25 + 9)


def test_every_micro_batch_has_the_same_shape(shards_dir: Path, tokenizer_dir: Path) -> None:
    sequences, vocab_size = sequences_of("contiguous", shards_dir, tokenizer_dir)
    plan = BatchPlan(10, 3, 2)
    batches = batches_of(sequences, shuffled(sequences, 0), masker(vocab_size), plan)
    dealt = [
        batches.micro_batch(update, step, rank)
        for update in range(20)
        for step in range(plan.gradient_accumulation_steps)
        for rank in range(2)
    ]
    assert {(batch.input_ids.shape, batch.masked_positions.shape, batch.labels.shape) for batch in dealt} == {((3, 64), (3, 10), (3, 10))}
