"""The masks are RoBERTa's, measured against transformers' own collator, and a pure function of (seed, epoch, sample)."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from kantai.masking import IGNORED_LABEL, MaskedRows, Masker
from kantai.shards import open_shards

BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 4
SPECIAL = (BOS, PAD, EOS, UNK, MASK)
VOCAB_SIZE = 1000
ROBERTA = Masker(0.15, 0.8, 0.1, VOCAB_SIZE, MASK, SPECIAL, seed=5)


def mask(masker: Masker, rows: np.ndarray, epoch: int = 0, first_sample: int = 0) -> MaskedRows:
    samples = first_sample + np.arange(len(rows))
    return masker(rows, np.full(len(rows), epoch), samples)


def is_masked(rows: np.ndarray, masked: MaskedRows) -> np.ndarray:
    """Where tokens are to be predicted, [rows, length]."""
    where = np.zeros(rows.shape, np.bool_)
    real = masked.labels != IGNORED_LABEL
    where[np.nonzero(real)[0], masked.masked_positions[real]] = True
    return where


def ordinary_rows(count: int, ordinary: int) -> np.ndarray:
    """Rows of ``<s>`` and ordinary tokens."""
    rows = np.random.default_rng(0).integers(len(SPECIAL), VOCAB_SIZE, (count, ordinary + 1))
    rows[:, 0] = BOS
    return rows


def assert_share(successes: int, trials: int, share: float) -> None:
    """Fails once in 15,000 fair trials, and seeds are fixed."""
    assert abs(successes / trials - share) <= 4 * math.sqrt(share * (1 - share) / trials), (successes / trials, share)


def test_a_row_by_hand() -> None:
    row = np.array([[BOS, 10, 11, UNK, 12, 13, EOS, PAD]])
    masked = Masker(0.5, 1.0, 0.0, VOCAB_SIZE, MASK, SPECIAL, seed=0)(row, np.array([0]), np.array([0]))
    assert masked.labels.shape == masked.masked_positions.shape == (1, 4)  # int(0.5 * 7) + 1
    assert (masked.labels[0] != IGNORED_LABEL).tolist() == [True, True, False, False]  # half of the four ordinary tokens
    first, second = masked.masked_positions[0, :2].tolist()
    assert {first, second} < {1, 2, 4, 5} and masked.masked_positions[0, 2:].tolist() == [0, 0]
    assert masked.labels[0, :2].tolist() == row[0, [first, second]].tolist()
    assert masked.input_ids[0].tolist() == [MASK if place in (first, second) else token for place, token in enumerate(row[0].tolist())]


@given(data=st.data(), ratio=st.floats(0.01, 0.99), length=st.integers(2, 40), seed=st.integers(0, 2**63))
def test_any_rows(data: st.DataObject, ratio: float, length: int, seed: int) -> None:
    rows = np.array(data.draw(st.lists(st.lists(st.integers(0, 12), min_size=length, max_size=length), min_size=1, max_size=5)))
    rows[:, 0] = BOS
    before = rows.copy()
    masker = Masker(ratio, 0.6, 0.3, 13, MASK, SPECIAL, seed)
    masked = mask(masker, rows)
    assert np.array_equal(rows, before)
    assert masked.labels.shape == masked.masked_positions.shape == (len(rows), masker.most_masked(length))

    where = is_masked(rows, masked)
    assert not where[np.isin(rows, SPECIAL)].any()
    assert np.array_equal(masked.input_ids[~where], rows[~where])
    real = masked.labels != IGNORED_LABEL
    assert np.array_equal(where.sum(1), real.sum(1))  # no position twice
    assert np.array_equal(masked.labels[real], np.take_along_axis(rows, masked.masked_positions, 1)[real])
    assert (masked.masked_positions[~real] == 0).all()
    for count, ordinary in zip(real.sum(1), (~np.isin(rows, SPECIAL)).sum(1), strict=True):
        assert math.floor(ratio * ordinary) <= count <= math.ceil(ratio * ordinary)
    assert masked.input_ids.min() >= 0 and masked.input_ids.max() < 13


def test_a_row_has_its_mask_wherever_it_stands() -> None:
    rows = ordinary_rows(8, 63)
    epochs, samples = np.array([0, 0, 1, 1, 7, 7, 7, 10**6]), np.array([0, 1, 0, 1, 5, 6, 10**10, 3])
    together = ROBERTA(rows, epochs, samples)
    shuffled = np.random.default_rng(1).permutation(8)
    again = ROBERTA(rows[shuffled], epochs[shuffled], samples[shuffled])
    for key in ("input_ids", "masked_positions", "labels"):
        expected = getattr(together, key)
        assert np.array_equal(getattr(again, key), expected[shuffled])
        for place in range(8):
            alone = ROBERTA(rows[place : place + 1], epochs[place : place + 1], samples[place : place + 1])
            assert np.array_equal(getattr(alone, key)[0], expected[place])


@pytest.mark.parametrize("length", [16, 500])
def test_padding_changes_no_mask(length: int) -> None:
    rows = ordinary_rows(200, length - 1)
    padded = np.pad(rows, ((0, 0), (0, length)), constant_values=PAD)
    short, long = mask(ROBERTA, rows), mask(ROBERTA, padded)
    assert np.array_equal(long.input_ids[:, :length], short.input_ids)
    assert np.array_equal(is_masked(padded, long)[:, :length], is_masked(rows, short))


@pytest.mark.parametrize("other", ["epoch", "sample", "seed"])
def test_every_epoch_sample_and_seed_has_masks_of_its_own(other: str) -> None:
    rows = np.tile(ordinary_rows(1, 63), (100, 1))
    ones = np.ones(100, np.int64)
    if other == "seed":
        masks = [dataclasses.replace(ROBERTA, seed=seed)(rows[:1], ones[:1], ones[:1]) for seed in range(100)]
        found = {mask.input_ids.tobytes() for mask in masks}
    else:
        masked = ROBERTA(rows, np.arange(100) if other == "epoch" else ones, np.arange(100) if other == "sample" else ones)
        found = {row.tobytes() for row in masked.input_ids}
    assert len(found) == 100


@pytest.mark.parametrize("ordinary", [1, 2, 3, 7, 63])
def test_share_is_right_on_average_for_rows_of_any_length(ordinary: int) -> None:
    rows = ordinary_rows(40_000, ordinary)
    counts = is_masked(rows, mask(ROBERTA, rows)).sum(1)
    whole = math.floor(0.15 * ordinary)
    assert set(counts.tolist()) == {whole, whole + 1}
    assert_share(int((counts - whole).sum()), len(rows), 0.15 * ordinary - whole)


def test_places_are_uniform_and_independent() -> None:
    rows = ordinary_rows(20_000, 63)
    where = is_masked(rows, mask(ROBERTA, rows))[:, 1:]
    for place in range(63):
        assert_share(int(where[:, place].sum()), len(rows), 0.15)
    neighbours = (where[:, 1:] & where[:, :-1]).sum()
    both = (9 * 8 * 0.55 + 10 * 9 * 0.45) / (63 * 62)  # 9 or 10 of 63 are masked, 9.45 on average
    assert_share(int(neighbours), 62 * len(rows), both)


def collated(tokenizer_dir: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What transformers' collator makes of rows: ids, and where tokens are to be predicted."""
    collator = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(str(tokenizer_dir)), mlm_probability=0.15, seed=9)
    batch = collator([{"input_ids": row} for row in rows.tolist()])
    assert np.array_equal(batch["labels"][batch["labels"] != -100].numpy(), rows[(batch["labels"] != -100).numpy()])
    return batch["input_ids"].numpy(), (batch["labels"] != -100).numpy()


def test_statistics_are_those_of_transformers_collator(shards_dir: Path, tokenizer_dir: Path) -> None:
    stream = open_shards(shards_dir).splits["train"][0].tokens[: 63 * 1700].astype(np.int64)
    rows = np.tile(np.pad(stream.reshape(-1, 63), ((0, 0), (1, 0)), constant_values=BOS), (4, 1))
    assert (rows[:, 1:] == EOS).sum() > 1000  # some to leave alone

    ours = mask(ROBERTA, rows)
    random_ids = []
    for ids, where in [(ours.input_ids, is_masked(rows, ours)), collated(tokenizer_dir, rows)]:
        assert np.array_equal(ids[~where], rows[~where])
        assert not where[np.isin(rows, SPECIAL)].any()
        masked = int(where.sum())
        assert_share(masked, int((~np.isin(rows, SPECIAL)).sum()), 0.15)
        # A random id is <mask> or the token itself once in VOCAB_SIZE.
        assert_share(int((ids[where] == MASK).sum()), masked, 0.8 + 0.1 / VOCAB_SIZE)
        assert_share(int((ids[where] == rows[where]).sum()), masked, 0.1 + 0.1 / VOCAB_SIZE)
        random_ids.append(ids[where & (ids != MASK) & (ids != rows)])
    for found in random_ids:  # the whole vocabulary, special tokens among it
        assert found.min() < len(SPECIAL) and found.max() > VOCAB_SIZE - 10
        tens = np.bincount(found // 10, minlength=VOCAB_SIZE // 10)
        statistic = ((tens - tens.mean()) ** 2 / tens.mean()).sum()
        assert abs(statistic - 99) < 4 * math.sqrt(2 * 99)


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.5)])
def test_shares_are_the_ones_asked_for(mask_share: float, random_share: float) -> None:
    rows = ordinary_rows(4000, 63)
    masked = mask(Masker(0.15, mask_share, random_share, VOCAB_SIZE, MASK, SPECIAL, seed=1), rows)
    where = is_masked(rows, masked)
    shown, total, by_chance = masked.input_ids[where], int(where.sum()), random_share / VOCAB_SIZE
    assert_share(int((shown == MASK).sum()), total, mask_share + by_chance)
    assert_share(int((shown == rows[where]).sum()), total, 1 - mask_share - random_share + by_chance)
