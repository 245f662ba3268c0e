"""A step shows the right tokens, and the same rows on any number of ranks."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kantai.config.batch_plan import BatchPlan
from kantai.config.loading import load_config
from kantai.data.batches import Batch, Batches, Order, Stage, document_starts
from kantai.data.dataset import open_data
from kantai.data.masking import IGNORED_LABEL, MaskedRows, Masker
from kantai.data.packing import Contiguous, Padded, Sequences
from kantai.data.shards import open_shards
from kantai.data.shuffle import Sequential, Shuffled
from kantai.data.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT
from tests.helpers.shards_in_memory import split_of, streams

BOS, PAD, EOS, MASK = 0, 1, 2, 4
SPECIAL = (0, 1, 2, 3, 4)
LENGTH = 32
SMALL = [
    "--model.hidden_size=32",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
    f"--data.seq_len={LENGTH}",
]

# A row without padding: its ids, and pairs of masked position and label.
Row = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


def masker(vocab_size: int = 1000, ratio: float = 0.15) -> Masker:
    return Masker(ratio, 0.8, 0.1, vocab_size, MASK, SPECIAL, seed=11)


def shuffled(sequences: Sequences, seed: int) -> Shuffled:
    return Shuffled(sequences.samples_per_shard, 2, seed)


def count(sequences: Sequences) -> int:
    return int(sequences.samples_per_shard.sum())


def batches_of(sequences: Sequences, order: Order, mask: Masker, plan: BatchPlan) -> Batches:
    """Return the batches of a run with one stage."""
    return Batches([Stage(0, 0, plan, sequences, order)], mask, PAD)


def rows_of(batch: Batch | MaskedRows) -> list[Row]:
    rows = []
    for ids, positions, labels in zip(
        batch.input_ids.tolist(),
        batch.masked_positions.tolist(),
        batch.labels.tolist(),
        strict=True,
    ):
        while ids[-1] == PAD:
            ids.pop()
        answers = sorted(
            (position, label)
            for position, label in zip(positions, labels, strict=True)
            if label != IGNORED_LABEL
        )
        rows.append((tuple(ids), tuple(answers)))
    return rows


def sequences_of(kind: str, shards_dir: Path, tokenizer_dir: Path) -> tuple[Sequences, int]:
    vocabulary = load_tokenizer(tokenizer_dir)
    shards = open_shards(shards_dir).splits["held_out"]
    if kind == "padded":
        return Padded(shards, 64, BOS, EOS, PAD), vocabulary.size
    return Contiguous(shards, 64, BOS, PAD), vocabulary.size


@pytest.mark.parametrize("kind", ["contiguous", "padded"])
def test_step_is_independent_of_ranks_and_micro_batches(
    kind: str, shards_dir: Path, tokenizer_dir: Path
) -> None:
    sequences, vocab_size = sequences_of(kind, shards_dir, tokenizer_dir)
    order = shuffled(sequences, 3)

    def step(
        number: int, world_size: int, micro_batch_size: int
    ) -> tuple[list[Row], list[Row], int, int]:
        """Return the ordered rows of a step, its empty rows, tokens and pairs."""
        plan = BatchPlan(12, micro_batch_size, world_size)
        batches = batches_of(sequences, order, masker(vocab_size), plan)
        dealt = [
            batches.micro_batch(number, micro_step, rank)
            for rank, micro_step in itertools.product(
                range(world_size), range(plan.gradient_accumulation_steps)
            )
        ]
        rows = [row for batch in dealt for row in rows_of(batch)]
        return (
            rows[:12],
            rows[12:],
            sum(batch.tokens for batch in dealt),
            sum(batch.attended_pairs for batch in dealt),
        )

    seen = set()
    last_of_epoch = (count(sequences) - 1) // 12
    for number in (0, 1, last_of_epoch, 10**6):
        expected, empty, tokens, pairs = step(number, 1, 12)
        epochs, samples = order.at(number * 12 + np.arange(12))
        assert (
            sorted(expected)
            == sorted(rows_of(masker(vocab_size)(sequences.rows(samples), epochs, samples, number)))
            and not empty
        )
        assert sum(len(answers) for _, answers in expected) > 20
        assert (tokens, pairs) == (
            sum(len(ids) for ids, _ in expected),
            sum(len(ids) ** 2 for ids, _ in expected),
        )
        seen.add(tuple(expected))

        for world_size, micro_batch_size in itertools.product((1, 2, 3, 5), (1, 2, 5, 12)):
            rows, empty, *work = step(number, world_size, micro_batch_size)
            assert rows == expected
            assert empty == [((BOS,), ())] * BatchPlan(12, micro_batch_size, world_size).empty_rows
            assert work == [tokens, pairs]
    assert len(seen) == 4


def test_epoch_shows_every_sequence_once(shards_dir: Path, tokenizer_dir: Path) -> None:
    sequences, vocab_size = sequences_of("contiguous", shards_dir, tokenizer_dir)
    plan = BatchPlan(8, 3, 2)
    batches = batches_of(sequences, shuffled(sequences, 0), masker(vocab_size), plan)
    shown_by_epoch: list[list[tuple[int, ...]]] = [[], []]
    for step in range(-(-count(sequences) // 8)):
        epochs, samples = batches.samples(step)
        dealt = [
            batches.micro_batch(step, micro_step, rank)
            for rank in range(2)
            for micro_step in range(plan.gradient_accumulation_steps)
        ]
        for epoch, sample, (ids, answers) in zip(
            epochs, samples, (row for batch in dealt for row in rows_of(batch)), strict=True
        ):
            original = np.array(ids)
            original[[position for position, _ in answers]] = [label for _, label in answers]
            shown_by_epoch[epoch] += [tuple(original.tolist())] if sample >= 0 else []
    assert sorted(shown_by_epoch[0]) == sorted(
        map(tuple, sequences.rows(np.arange(count(sequences))).tolist())
    )


def test_rank_reads_few_shards_of_window() -> None:
    """Ranks get rows in the order of samples: each of two ranks reads about half of the shards."""
    sequences = Contiguous(streams(*(np.arange(100, 1000) for _ in range(16))), 10, BOS, PAD)
    batches = batches_of(
        sequences, Shuffled(sequences.samples_per_shard, 16, 0), masker(), BatchPlan(160, 8, 2)
    )
    for step in range(10):
        read = [batches.shards(step, rank) for rank in range(2)]
        assert set(read[0]) | set(read[1]) == set(range(16))
        assert all(len(shards) <= 10 for shards in read)
        for rank, shards in enumerate(read):
            micro_steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
            ids = np.concatenate(
                [
                    batches.micro_batch(step, micro_step, rank).input_ids
                    for micro_step in micro_steps
                ]
            )
            assert len(ids) == 80 and shards == sorted(shards)


def test_evaluation_ends_with_empty_rows() -> None:
    sequences = Contiguous(streams(np.arange(100, 140)), 9, BOS, PAD)
    batches = batches_of(
        sequences, Sequential(count(sequences)), masker(ratio=0.5), BatchPlan(4, 4, 1)
    )
    last = batches.micro_batch(1, 0, 0)
    assert count(sequences) == 5
    assert (last.labels[0] != IGNORED_LABEL).sum() == 4 and (last.labels[1:] == IGNORED_LABEL).all()
    assert last.input_ids[1:].tolist() == [[BOS, *[PAD] * 8]] * 3
    assert (last.tokens, last.attended_pairs) == (9, 81)


def test_attention_mask_marks_padding() -> None:
    plan = BatchPlan(3, 4, 1)
    order = Sequential(2)
    full = batches_of(
        Contiguous(streams(np.arange(100, 120)), 11, BOS, PAD), order, masker(ratio=0.5), plan
    ).micro_batch(0, 0, 0)
    assert full.attention_mask is None

    documents = split_of((np.array([10, 11, 12, EOS, 13, EOS], np.uint16), [0, 4, 6]))
    padded = batches_of(
        Padded(documents, 64, BOS, EOS, PAD), order, masker(ratio=0.5), plan
    ).micro_batch(0, 0, 0)
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [
        [True] * 5 + [False] * 11,
        [True] * 3 + [False] * 13,
        [True] + [False] * 15,
    ]
    assert (padded.tokens, padded.attended_pairs) == (5 + 3, 25 + 9)


def test_micro_batches_have_equal_shapes(shards_dir: Path, tokenizer_dir: Path) -> None:
    sequences, vocab_size = sequences_of("contiguous", shards_dir, tokenizer_dir)
    plan = BatchPlan(10, 3, 2)
    batches = batches_of(sequences, shuffled(sequences, 0), masker(vocab_size), plan)
    dealt = [
        batches.micro_batch(step, micro_step, rank)
        for step in range(20)
        for micro_step in range(plan.gradient_accumulation_steps)
        for rank in range(2)
    ]
    assert {
        (batch.input_ids.shape, batch.masked_positions.shape, batch.labels.shape) for batch in dealt
    } == {((3, 64), (3, 10), (3, 10))}


def batch_of(packing: str, shards_dir: Path, tokenizer_dir: Path) -> Batch:
    """Return three rows of the training split, the last one empty."""
    where = [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--data.packing={packing}",
    ]
    sizes = ["--batch.global_batch_size=5", "--batch.micro_batch_size=3"]
    data = open_data(load_config(ROOT / "configs/quickstart.yaml", [*SMALL, *where, *sizes]))
    return data.training_batches(1).micro_batch(3, 1, 0)


def test_documents_start_at_rows_and_after_end_tokens() -> None:
    rows = [[BOS, 5, 6, EOS, 7, EOS], [BOS, EOS, EOS, 5, 6, 7], [BOS, PAD, PAD, PAD, PAD, PAD]]
    starts = document_starts(np.array(rows), EOS)
    assert starts.tolist() == [0, 4, 6, 8, 9, 12, *[18] * 58]


@pytest.mark.parametrize(("documents", "size"), [(1, 64), (63, 64), (64, 128), (200, 256)])
def test_document_starts_are_padded_to_few_sizes(documents: int, size: int) -> None:
    starts = document_starts(np.array([[EOS] * (documents - 1) + [5, 6]]), EOS)
    assert starts.shape == (size,)
    assert (
        starts[documents - 1] == documents - 1 and starts[-1] == starts[documents] == documents + 1
    )


def test_isolated_rows_count_pairs_within_documents(shards_dir: Path, tokenizer_dir: Path) -> None:
    isolated, contiguous = (
        batch_of(packing, shards_dir, tokenizer_dir) for packing in ("isolated", "contiguous")
    )
    for name in ("input_ids", "masked_positions", "labels"):
        assert np.array_equal(getattr(isolated, name), getattr(contiguous, name))
    assert isolated.tokens == contiguous.tokens == 2 * LENGTH
    assert contiguous.document_starts is None and isolated.document_starts is not None
    starts = np.unique(isolated.document_starts)
    assert isolated.attended_pairs == sum(
        (b - a) ** 2 for a, b in itertools.pairwise(starts[starts <= 2 * LENGTH].tolist())
    )
    assert contiguous.attended_pairs == 2 * LENGTH**2 > isolated.attended_pairs


def test_random_end_token_ends_no_document() -> None:
    stream = np.array([*range(3, 12), EOS, *range(3, 13)])
    # Every replacement is <s>, <pad> or </s>.
    masker = Masker(0.9, 0.0, 1.0, EOS + 1, MASK, (BOS, PAD, EOS), seed=0)
    stage = Stage(
        0, 0, BatchPlan(1, 1, 1), Contiguous(streams(stream), 21, BOS, PAD), Sequential(1)
    )
    batch = Batches([stage], masker, PAD, EOS).micro_batch(0, 0, 0)
    assert (batch.input_ids == EOS).sum() > 1
    assert np.unique(batch.document_starts).tolist() == [0, 11, 21]
