"""Masks have the statistics of transformers' collator, and depend on (seed, epoch, sample) only."""

import dataclasses
import hashlib
import math
from itertools import accumulate, pairwise, permutations
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from kantai.data.masking import (
    IGNORED_LABEL,
    MAX_WORD_TOKENS,
    MEAN_SPAN_WORDS,
    MaskedRows,
    Masker,
    Words,
)
from kantai.data.shards import open_shards
from kantai.data.tokenizer import load_tokenizer
from kantai.preprocessing.tokenizer_training import train_tokenizer

BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 4
SPECIAL = (BOS, PAD, EOS, UNK, MASK)
VOCAB_SIZE = 1000
Unit = Literal["token", "word", "span"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def toy_words(vocab_size: int = VOCAB_SIZE) -> Words:
    """Build words that begin at ids divisible by 3."""
    kinds = np.stack([np.arange(vocab_size) % 3 != 0, np.ones(vocab_size)]).astype(np.uint8)
    kinds[:, list(SPECIAL)] = 0
    return Words(*kinds)


ROBERTA = Masker(0.15, 0.8, 0.1, VOCAB_SIZE, MASK, SPECIAL, seed=5, words=toy_words())


def masker_for(unit: Unit) -> Masker:
    return dataclasses.replace(ROBERTA, unit=unit)


def mask(masker: Masker, rows: np.ndarray, epoch: int = 0, first_sample: int = 0) -> MaskedRows:
    samples = first_sample + np.arange(len(rows))
    return masker(rows, np.full(len(rows), epoch), samples, 0)


def toy_words_of(row: list[int]) -> list[list[int]]:
    """Return the positions of a row's words, long words in pieces."""
    words: list[list[int]] = []
    for place, token in enumerate(row):
        if token in SPECIAL:
            continue
        if token % 3 == 0 or row[place - 1] in SPECIAL or len(words[-1]) == MAX_WORD_TOKENS:
            words.append([])
        words[-1].append(place)
    return words


def is_masked(rows: np.ndarray, masked: MaskedRows) -> np.ndarray:
    """Return where the model predicts tokens, [rows, length]."""
    where = np.zeros(rows.shape, np.bool_)
    real = masked.labels != IGNORED_LABEL
    where[np.nonzero(real)[0], masked.masked_positions[real]] = True
    return where


def ordinary_rows(count: int, ordinary: int) -> np.ndarray:
    """Return rows of ``<s>`` and ordinary tokens."""
    rows = np.random.default_rng(0).integers(len(SPECIAL), VOCAB_SIZE, (count, ordinary + 1))
    rows[:, 0] = BOS
    return rows


def assert_share(successes: float, trials: float, share: float) -> None:
    """Allow 4 standard errors: a fair share fails once in 15,000 times. Seeds are fixed."""
    assert abs(successes / trials - share) <= 4 * math.sqrt(share * (1 - share) / trials), (
        successes / trials,
        share,
    )


def test_masked_row_matches_hand_calculation() -> None:
    row = np.array([[BOS, 10, 11, UNK, 12, 13, EOS, PAD]])
    masked = Masker(0.5, 1.0, 0.0, VOCAB_SIZE, MASK, SPECIAL, seed=0)(
        row, np.array([0]), np.array([0]), 0
    )
    assert masked.labels.shape == masked.masked_positions.shape == (1, 4)  # int(0.5 * 7) + 1
    # Half of the four ordinary tokens.
    assert (masked.labels[0] != IGNORED_LABEL).tolist() == [True, True, False, False]
    first, second = masked.masked_positions[0, :2].tolist()
    assert {first, second} < {1, 2, 4, 5}
    assert masked.masked_positions[0, 2:].tolist() == [0, 0]
    assert masked.labels[0, :2].tolist() == row[0, [first, second]].tolist()
    assert masked.input_ids[0].tolist() == [
        MASK if place in (first, second) else token for place, token in enumerate(row[0].tolist())
    ]


def test_masked_words_match_hand_calculation() -> None:
    rows = np.tile([BOS, 6, 7, 8, EOS, 10, 9, 11, 13, 14, 12, 16, PAD, PAD], (1000, 1))
    words = [(1, 2, 3), (5,), (6, 7, 8, 9), (10, 11)]
    masked = mask(Masker(0.5, 1.0, 0.0, VOCAB_SIZE, MASK, SPECIAL, 0, "word", toy_words()), rows)
    found = {tuple(np.flatnonzero(ids == MASK).tolist()) for ids in masked.input_ids}
    # Five of ten tokens: the four words come in any order, and the words that fit are masked. The
    # first word that does not fit may be masked too.
    expected = set()
    for order in permutations(words):
        ends = list(accumulate(map(len, order)))
        fit = sum(end <= 5 for end in ends)
        expected |= {tuple(sorted(sum(order[:fit], ())))} | (
            {tuple(sorted(sum(order[: fit + 1], ())))} if 5 not in ends else set()
        )
    assert found == expected


@pytest.mark.parametrize(
    ("unit", "recorded"),
    [
        ("token", "d0dc9c776c1789be0639a1258de0e7780f8615344f2ad8424de6b28e8b63bc37"),
        ("word", "7abc0d1c47f2f1900b33fccc5fe1b378c3a011c75a7ea6c0e4a1834420f9b6be"),
        ("span", "b51179eb7bb973e449911c635bb3af5436e55e7c0e6d0e742e66e9740e3b71a4"),
    ],
)
def test_masks_match_recorded_hash(unit: Unit, recorded: str) -> None:
    found = hashlib.sha256()
    masker = dataclasses.replace(masker_for(unit), vocab_size=1000, seed=2**62 + 3)
    for length, ratio, count in [
        (2, 0.15, 7),
        (9, 0.5, 5),
        (40, 0.99, 6),
        (64, 0.15, 33),
        (128, 0.4, 16),
        (512, 0.15, 20),
    ]:
        rows = np.arange(count * length).reshape(count, length) * 7919 % 1000
        rows[:, 0] = BOS
        rows[::3, length - length // 4 :] = PAD
        numbers = np.arange(count)
        masked = dataclasses.replace(masker, ratio=ratio)(
            rows, numbers // 5, numbers * 10**9 - 1, 0
        )
        for array in (masked.input_ids, masked.masked_positions, masked.labels):
            found.update(array.tobytes())
    assert found.hexdigest() == recorded


@given(
    data=st.data(),
    unit=st.sampled_from(UNITS),
    ratio=st.floats(0.01, 0.99),
    length=st.integers(2, 40),
    seed=st.integers(0, 2**63),
)
def test_masks_keep_invariants_for_any_rows(
    data: st.DataObject, unit: Unit, ratio: float, length: int, seed: int
) -> None:
    rows = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 12), min_size=length, max_size=length),
                min_size=1,
                max_size=5,
            )
        )
    )
    rows[:, 0] = BOS
    before = rows.copy()
    masker = Masker(ratio, 0.6, 0.3, 13, MASK, SPECIAL, seed, unit, toy_words(13))
    masked = mask(masker, rows)
    assert np.array_equal(rows, before)
    assert (
        masked.labels.shape == masked.masked_positions.shape == (len(rows), masker.slots(length, 0))
    )

    where = is_masked(rows, masked)
    assert not where[np.isin(rows, SPECIAL)].any()
    assert np.array_equal(masked.input_ids[~where], rows[~where])
    real = masked.labels != IGNORED_LABEL
    assert np.array_equal(where.sum(1), real.sum(1))  # no position twice
    assert np.array_equal(
        masked.labels[real], np.take_along_axis(rows, masked.masked_positions, 1)[real]
    )
    assert (masked.masked_positions[~real] == 0).all()
    for count, ordinary in zip(real.sum(1), (~np.isin(rows, SPECIAL)).sum(1), strict=True):
        slack = MAX_WORD_TOKENS - 1 if unit == "word" else 0
        assert math.floor(ratio * ordinary) - slack <= count <= math.ceil(ratio * ordinary) + slack
    if unit == "word":
        assert all(
            len(set(there[word])) == 1
            for row, there in zip(rows.tolist(), where, strict=True)
            for word in toy_words_of(row)
        )
    assert masked.input_ids.min() >= 0 and masked.input_ids.max() < 13


@pytest.mark.parametrize("unit", UNITS)
def test_mask_is_independent_of_place_in_batch(unit: Unit) -> None:
    rows = ordinary_rows(8, 63)
    masker = masker_for(unit)
    epochs = np.array([0, 0, 1, 1, 7, 7, 7, 10**6])
    samples = np.array([0, 1, 0, 1, 5, 6, 10**10, 3])
    together = masker(rows, epochs, samples, 0)
    shuffled = np.random.default_rng(1).permutation(8)
    again = masker(rows[shuffled], epochs[shuffled], samples[shuffled], 0)
    for key in ("input_ids", "masked_positions", "labels"):
        expected = getattr(together, key)
        assert np.array_equal(getattr(again, key), expected[shuffled])
        for place in range(8):
            alone = masker(
                rows[place : place + 1], epochs[place : place + 1], samples[place : place + 1], 0
            )
            assert np.array_equal(getattr(alone, key)[0], expected[place])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("length", [16, 500])
def test_padding_changes_no_mask(unit: Unit, length: int) -> None:
    rows = ordinary_rows(200, length - 1)
    padded = np.pad(rows, ((0, 0), (0, length)), constant_values=PAD)
    short = mask(masker_for(unit), rows)
    long = mask(masker_for(unit), padded)
    assert np.array_equal(long.input_ids[:, :length], short.input_ids)
    assert np.array_equal(is_masked(padded, long)[:, :length], is_masked(rows, short))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("other", ["epoch", "sample", "seed"])
def test_masks_differ_by_epoch_sample_and_seed(other: str, unit: Unit) -> None:
    rows = np.tile(ordinary_rows(1, 255), (100, 1))
    ones = np.ones(100, np.int64)
    if other == "seed":
        masks = [
            dataclasses.replace(masker_for(unit), seed=seed)(rows[:1], ones[:1], ones[:1], 0)
            for seed in range(100)
        ]
        found = {mask.input_ids.tobytes() for mask in masks}
    else:
        masked = masker_for(unit)(
            rows,
            np.arange(100) if other == "epoch" else ones,
            np.arange(100) if other == "sample" else ones,
            0,
        )
        found = {row.tobytes() for row in masked.input_ids}
    assert len(found) == 100


@pytest.mark.parametrize("unit", ["token", "span"])
@pytest.mark.parametrize("ordinary", [1, 2, 3, 7, 63])
def test_average_share_matches_ratio_at_any_length(unit: Unit, ordinary: int) -> None:
    rows = ordinary_rows(40_000, ordinary)
    counts = is_masked(rows, mask(masker_for(unit), rows)).sum(1)
    whole = math.floor(0.15 * ordinary)
    assert set(counts.tolist()) == {whole, whole + 1}
    assert_share(int((counts - whole).sum()), len(rows), 0.15 * ordinary - whole)


@pytest.mark.parametrize("ordinary", [1, 2, 3, 7, 63, 127])
# Words have one token, three on average, or the whole row.
@pytest.mark.parametrize("divisor", [1, 3, VOCAB_SIZE])
def test_average_share_matches_ratio_for_words(ordinary: int, divisor: int) -> None:
    words = toy_words()
    words.begins[len(SPECIAL) :] = np.arange(len(SPECIAL), VOCAB_SIZE) % divisor != 0
    rows = ordinary_rows(20_000, ordinary)
    counts = is_masked(
        rows, mask(Masker(0.15, 0.8, 0.1, VOCAB_SIZE, MASK, SPECIAL, 5, "word", words), rows)
    ).sum(1)
    assert abs(counts.mean() - 0.15 * ordinary) <= 4 * counts.std() / math.sqrt(len(rows))
    assert abs(counts - 0.15 * ordinary).max() < MAX_WORD_TOKENS


def test_spans_are_geometric_and_replaced_whole() -> None:
    rows = np.tile(np.array([BOS, *[6, 7] * 250]), (400, 1))  # words of two tokens
    masked = mask(Masker(0.99, 0.5, 0.0, VOCAB_SIZE, MASK, SPECIAL, 3, "span", toy_words()), rows)
    lengths = []
    mixed = 0
    for slots, labels, ids in zip(
        masked.masked_positions, masked.labels, masked.input_ids, strict=True
    ):
        positions = slots[labels != IGNORED_LABEL]
        # In slots, a span is a run of positions. One run in a hundred is two spans, which are
        # neighbours in the row and by chance also in the slots.
        spans = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        lengths += [len(span) for span in spans[:-1]]  # the ratio cuts the last one short
        mixed += sum(len(set(ids[span] == MASK)) > 1 for span in spans)

    words = np.array(lengths) / 2
    assert np.array_equal(words, words.round())
    assert abs(words.mean() - MEAN_SPAN_WORDS) < 0.02 * MEAN_SPAN_WORDS
    for length in range(1, 6):
        assert (
            abs(
                (words == length).mean()
                - (1 - 1 / MEAN_SPAN_WORDS) ** (length - 1) / MEAN_SPAN_WORDS
            )
            < 0.01
        )
    assert mixed < 0.01 * len(words)


def test_masked_positions_are_uniform_and_independent() -> None:
    rows = ordinary_rows(20_000, 63)
    where = is_masked(rows, mask(ROBERTA, rows))[:, 1:]
    for place in range(63):
        assert_share(int(where[:, place].sum()), len(rows), 0.15)
    neighbours = (where[:, 1:] & where[:, :-1]).sum()
    both = (9 * 8 * 0.55 + 10 * 9 * 0.45) / (63 * 62)  # 9 or 10 of 63 are masked, 9.45 on average
    assert_share(int(neighbours), 62 * len(rows), both)


def collated(tokenizer_dir: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the collator's ids, and where the model predicts tokens."""
    collator = DataCollatorForLanguageModeling(
        AutoTokenizer.from_pretrained(str(tokenizer_dir)), mlm_probability=0.15, seed=9
    )
    batch = collator([{"input_ids": row} for row in rows.tolist()])
    assert np.array_equal(
        batch["labels"][batch["labels"] != -100].numpy(), rows[(batch["labels"] != -100).numpy()]
    )
    return batch["input_ids"].numpy(), (batch["labels"] != -100).numpy()


def test_statistics_match_transformers_collator(shards_dir: Path, tokenizer_dir: Path) -> None:
    stream = open_shards(shards_dir).splits["train"][0].tokens[: 63 * 1700].astype(np.int64)
    rows = np.tile(np.pad(stream.reshape(-1, 63), ((0, 0), (1, 0)), constant_values=BOS), (4, 1))
    assert (rows[:, 1:] == EOS).sum() > 1000  # special tokens to leave alone

    ours = mask(ROBERTA, rows)
    random_ids = []
    for ids, where in [(ours.input_ids, is_masked(rows, ours)), collated(tokenizer_dir, rows)]:
        assert np.array_equal(ids[~where], rows[~where])
        assert not where[np.isin(rows, SPECIAL)].any()
        masked = int(where.sum())
        assert_share(masked, int((~np.isin(rows, SPECIAL)).sum()), 0.15)
        # One random id in VOCAB_SIZE is <mask>, and one is the token itself.
        assert_share(int((ids[where] == MASK).sum()), masked, 0.8 + 0.1 / VOCAB_SIZE)
        assert_share(int((ids[where] == rows[where]).sum()), masked, 0.1 + 0.1 / VOCAB_SIZE)
        random_ids.append(ids[where & (ids != MASK) & (ids != rows)])
    for found in random_ids:  # from the whole vocabulary, special tokens included
        assert found.min() < len(SPECIAL) and found.max() > VOCAB_SIZE - 10
        tens = np.bincount(found // 10, minlength=VOCAB_SIZE // 10)
        statistic = ((tens - tens.mean()) ** 2 / tens.mean()).sum()
        assert abs(statistic - 99) < 4 * math.sqrt(2 * 99)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("mask_share", "random_share"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.5)]
)
def test_replacement_shares_match_settings(
    mask_share: float, random_share: float, unit: Unit
) -> None:
    rows = ordinary_rows(4000, 63)
    masked = mask(
        Masker(0.15, mask_share, random_share, VOCAB_SIZE, MASK, SPECIAL, 1, unit, toy_words()),
        rows,
    )
    where = is_masked(rows, masked)
    shown = masked.input_ids[where]
    total = int(where.sum())
    by_chance = random_share / VOCAB_SIZE

    # The tokens of a span share their replacement, so that a span is one trial. Spans differ in
    # length, which costs some more trials.
    tokens_a_trial = 9.45 if unit == "span" else 1
    for found, share in [
        (shown == MASK, mask_share + by_chance),
        (shown == rows[where], 1 - mask_share - random_share + by_chance),
    ]:
        assert_share(int(found.sum()) / tokens_a_trial, total / tokens_a_trial, share)


def test_tokens_of_word_are_replaced_independently() -> None:
    rows = np.tile(np.array([BOS, *[6, 7] * 50]), (1000, 1))  # words of two tokens
    masked = mask(Masker(0.15, 0.5, 0.0, VOCAB_SIZE, MASK, SPECIAL, 3, "word", toy_words()), rows)
    hidden = is_masked(rows, masked)[:, 1::2]
    shown = masked.input_ids[:, 1:].reshape(1000, 50, 2)[hidden]
    assert_share(int(((shown[:, 0] == MASK) != (shown[:, 1] == MASK)).sum()), len(shown), 0.5)


def test_ratio_falls_linearly_over_steps() -> None:
    rows = ordinary_rows(64, 127)
    numbers = np.arange(64)
    constant = ROBERTA
    assert {constant.ratio_at(step) for step in (0, 5, 10**9)} == {0.15}

    falling = dataclasses.replace(ROBERTA, ratio=0.4, final_ratio=0.15, max_steps=101)
    assert [falling.ratio_at(step) for step in (0, 100, 101, 10**9)] == [0.4, 0.15, 0.15, 0.15]
    assert falling.ratio_at(50) == pytest.approx(0.275)
    assert dataclasses.replace(falling, max_steps=1).ratio_at(0) == 0.4
    # A row has no more slots than tokens.
    assert dataclasses.replace(falling, ratio=0.95, unit="word").slots(20, 0) == 20

    for unit in UNITS:
        scheduled = dataclasses.replace(falling, unit=unit)
        shapes = set()
        for step in range(0, 101, 10):
            masked = scheduled(rows, numbers, numbers, step)
            ratio = scheduled.ratio_at(step)
            assert abs((masked.labels != IGNORED_LABEL).sum(1).mean() - ratio * 127) < 1
            same = dataclasses.replace(scheduled, ratio=ratio, final_ratio=None)(
                rows, numbers, numbers, 0
            )
            # The step changes the mask through the ratio only.
            assert np.array_equal(masked.input_ids, same.input_ids)
            shapes.add(masked.labels.shape[1])
        assert len(shapes) <= 6 and all(slots % 8 == 0 for slots in shapes)


def word_starts(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """Return where our words begin in a text's tokens, and the pre-tokenizer's words.

    The latter are pairs of a word's first token and the next word's first token.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    theirs = [
        0,
        *(place for place, (a, b) in enumerate(pairwise(encoding.word_ids), 1) if a != b),
        len(encoding.ids),
    ]
    assert len(theirs) - 1 == len(tokenizer.pre_tokenizer.pre_tokenize_str(text))
    words = Words.of(tokenizer, SPECIAL)
    return words.starts(np.array([encoding.ids]))[0], set(pairwise(theirs))


def test_words_match_pre_tokenizer_in_corpus(corpus_file: Path, tokenizer_dir: Path) -> None:
    starts, theirs = word_starts(
        load_tokenizer(tokenizer_dir).tokenizer, corpus_file.read_text(encoding="utf-8")
    )
    ours = set(pairwise([*np.flatnonzero(starts).tolist(), len(starts)]))
    assert len(theirs) > 70_000 and len(theirs & ours) >= 0.998 * len(theirs)


@given(text=st.text("abc XY,.-_19\n\té\u4e2d", min_size=1, max_size=40))
@example("  two  spaces\n\n and\n\nlines \n \tx ")
def test_words_equal_pre_tokenizer_in_plain_text(tokenizer_dir: Path, text: str) -> None:
    starts, theirs = word_starts(load_tokenizer(tokenizer_dir).tokenizer, text)
    assert set(pairwise([*np.flatnonzero(starts).tolist(), len(starts)])) == theirs


def test_words_end_after_contraction_tokens() -> None:
    text = "it's what they'll say: 'tis, don't;(can't), I'd've, we'really"
    tokenizer = train_tokenizer([text] * 5, 400, 2)
    starts, theirs = word_starts(tokenizer, text)
    assert tokenizer.token_to_id("'ll") is not None and tokenizer.token_to_id("'t") is not None
    assert set(pairwise([*np.flatnonzero(starts).tolist(), len(starts)])) == theirs


def test_words_end_at_special_tokens(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    bracket = vocabulary.tokenizer.token_to_id("(")
    starts = Words.of(vocabulary.tokenizer, vocabulary.special_ids).starts(
        np.array([[BOS, bracket, bracket, EOS, bracket, MASK]])
    )
    assert starts.tolist() == [[True, True, False, True, True, True]]
