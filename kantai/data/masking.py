"""Masking: RoBERTa's dynamic masks, from random numbers keyed by (seed, epoch, sample id)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from kantai.data import rng
from kantai.data.rng import Bools, Float64s, Int64s, UInt64s
from kantai.data.words import Words

IGNORED_LABEL = -100  # PyTorch's cross-entropy skips it
MEAN_SPAN_WORDS = 3.8  # SpanBERT's: a geometric distribution of p = 0.2, clipped at 10
# Longer words are masked in pieces. A row's last word may pass the wanted number of tokens, and
# slots are kept free for it: 7 with this limit.
MAX_WORD_TOKENS = 8
_SCHEDULED_MULTIPLE_OF = 8  # slots, so that a changing ratio gives few distinct shapes


@dataclass(frozen=True)
class MaskedRows:
    """Masked rows: the model's input and its labels."""

    input_ids: Int64s  # [rows, length]
    masked_positions: Int64s  # [rows, slots], 0 in unused slots
    labels: Int64s  # [rows, slots], IGNORED_LABEL in unused slots


class _Keys(NamedTuple):
    """Independent keys of random numbers for each row, [rows]."""

    rounding: UInt64s
    order: UInt64s
    replacement: UInt64s
    random_token: UInt64s
    cut: UInt64s

    @classmethod
    def of(cls, seed: int, epochs: Int64s, samples: Int64s) -> "_Keys":
        return cls(*rng.bits(rng.fold(seed, epochs, samples), np.arange(5)[:, None]))

    @property
    def rounding_offset(self) -> Float64s:
        """A number in [0, 1) that is added before rounding down, [rows, 1]."""
        return rng.uniform(self.rounding)[:, None]


class _Units(NamedTuple):
    """The units drawn in each row, in random order."""

    first: Int64s  # position of a unit's first token, [rows, units]
    masked: Int64s  # number of its tokens that are masked, from the first on, [rows, units]


def _choose_tokens(ordinary: Bools, ratio: float, keys: _Keys) -> _Units:
    """Single tokens."""
    first = _in_random_order(ordinary, ratio, keys)
    count = (_wanted(ordinary, ratio) + keys.rounding_offset).astype(np.int64)
    return _Units(first, (np.arange(first.shape[1]) < count).astype(np.int64))


def _choose_words(word_starts: Bools, ordinary: Bools, ratio: float, keys: _Keys) -> _Units:
    """Whole words, or pieces of ``MAX_WORD_TOKENS`` of a longer one.

    The word that would pass the wanted number is masked with the probability that keeps the share
    right on average.
    """
    places = np.arange(ordinary.shape[1])
    word_start = np.maximum.accumulate(np.where(word_starts, places, 0), axis=1)
    starts = word_starts | ((places - word_start) % MAX_WORD_TOKENS == 0)
    starts &= ordinary

    first = _in_random_order(starts, ratio, keys)
    lengths = np.take_along_axis(_lengths(starts | ~ordinary), first, 1)
    ends = np.cumsum(lengths, axis=1)
    fits = ends <= _wanted(ordinary, ratio) + keys.rounding_offset * lengths
    return _Units(first, np.where(fits, lengths, 0))


def _choose_spans(word_starts: Bools, ordinary: Bools, ratio: float, keys: _Keys) -> _Units:
    """Spans of words: a row is cut at random word starts, and the last span is cut short."""
    places = np.arange(ordinary.shape[1])
    cut = rng.bits(keys.cut[:, None], places) < np.uint64(int(2**64 / MEAN_SPAN_WORDS))
    cut[:, 1:] |= ~ordinary[:, :-1]
    starts = word_starts & cut & ordinary

    first = _in_random_order(starts, ratio, keys)
    lengths = np.take_along_axis(_lengths(starts | ~ordinary), first, 1)
    ends = np.cumsum(lengths, axis=1)
    count = (_wanted(ordinary, ratio) + keys.rounding_offset).astype(np.int64)
    return _Units(first, np.clip(count - (ends - lengths), 0, lengths))


def _wanted(ordinary: Bools, ratio: float) -> Float64s:
    """The number of tokens to mask, not yet rounded, [rows, 1]."""
    wanted: Float64s = ratio * ordinary.sum(1, keepdims=True)
    return wanted


def _max_masked(ratio: float, length: int) -> int:
    """Most masked tokens of a row of ``length`` tokens that begins with ``<s>``."""
    return int(ratio * (length - 1)) + 1


def _in_random_order(starts: Bools, ratio: float, keys: _Keys) -> Int64s:
    """Starts of units in random order, as many as tokens can be masked, [rows, units].

    Where a row has fewer units, positions that start none come last.
    """
    length = starts.shape[1]
    count = _max_masked(ratio, length)
    ranks = rng.bits(keys.order[:, None], np.arange(length))
    ranks[~starts] = np.iinfo(np.uint64).max
    smallest = np.argpartition(ranks, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(ranks, smallest, 1), axis=1)
    return np.take_along_axis(smallest, order, 1)


def _lengths(boundaries: Bools) -> Int64s:
    """Distance from every boundary to the next one or the row's end, [rows, length].

    It is 0 elsewhere. Every row must begin with a boundary.
    """
    places = np.flatnonzero(boundaries)
    lengths = np.zeros(boundaries.shape, np.int64)
    lengths.ravel()[places] = np.diff(places, append=boundaries.size)
    return lengths


@dataclass(frozen=True)
class Masker:
    """Masks a share of the tokens of every row.

    A masked token is shown as ``<mask>``, as a random token or as itself (BERT's 80/10/10). Units
    are masked in random order until ``ratio`` times the row's ordinary tokens are. That number is
    rounded up or down at random, so that the share is right on average for rows of any length.
    A unit is

    - a token;
    - a word of the text (BERT's whole-word masking; see :class:`Words`), in pieces of 8 tokens
      where it is longer;
    - a span of words (SpanBERT, Joshi et al. 2020): a row is cut at one in 3.8 of its word starts.
      A span draws one kind of replacement as a whole; the other units draw one for each token.

    No unit reaches past a special token. Rows of one length have one number of slots, so that the
    model's input shapes do not change.
    """

    ratio: float
    mask_share: float
    random_share: float
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    seed: int
    unit: Literal["token", "word", "span"] = "token"
    words: Words | None = None  # for the units word and span
    final_ratio: float | None = None  # reached linearly at the last of max_steps; None: constant
    max_steps: int = 1

    def ratio_at(self, step: int) -> float:
        """Share of the tokens that is masked in a step, counted from 0."""
        if self.final_ratio is None:
            return self.ratio
        done = min(1.0, step / max(1, self.max_steps - 1))
        return (1 - done) * self.ratio + done * self.final_ratio

    def slots(self, length: int, step: int) -> int:
        """Room for the masked tokens of a row of ``length`` tokens that begins with ``<s>``."""
        slots = _max_masked(self.ratio_at(step), length)
        if self.unit == "word":
            slots += MAX_WORD_TOKENS - 1
        if self.final_ratio is not None:
            slots = -(-slots // _SCHEDULED_MULTIPLE_OF) * _SCHEDULED_MULTIPLE_OF
        return min(slots, length)

    def __call__(self, rows: Int64s, epochs: Int64s, samples: Int64s, step: int) -> MaskedRows:
        """Mask rows, each by itself.

        A mask is a pure function of the row, its epoch and sample id, the seed and the step's
        ratio. Special tokens and padding are never masked.

        Args:
            rows: ids, [rows, length]; each row begins with ``<s>``.
            epochs: of each row, [rows].
            samples: sample id of each row, [rows].
            step: counted from 0; decides the ratio.
        """
        keys = _Keys.of(self.seed, epochs, samples)
        units = self._choose_units(rows, self.ratio_at(step), keys)
        return self._apply_masks(rows, units, keys, self.slots(rows.shape[1], step))

    def _choose_units(self, rows: Int64s, ratio: float, keys: _Keys) -> _Units:
        ordinary = ~np.isin(rows, self.special_ids)
        if self.unit == "token":
            return _choose_tokens(ordinary, ratio, keys)
        assert self.words is not None
        choose = {"word": _choose_words, "span": _choose_spans}[self.unit]
        return choose(self.words.starts(rows), ordinary, ratio, keys)

    def _apply_masks(self, rows: Int64s, units: _Units, keys: _Keys, slots: int) -> MaskedRows:
        # The arrays row, first, position and label have one entry for each masked token.
        masked_of_row = units.masked.sum(1)
        masked = units.masked.ravel()
        row = np.repeat(np.arange(len(rows)), masked_of_row)
        first = np.repeat(units.first.ravel(), masked)
        place_in_unit = np.arange(len(first)) - np.repeat(np.cumsum(masked) - masked, masked)
        position = first + place_in_unit
        label = rows[row, position]

        drawn_for = first if self.unit == "span" else position
        draw = rng.uniform(rng.bits(keys.replacement[row], drawn_for))
        token = rng.below(rng.bits(keys.random_token[row], position), self.vocab_size)
        shown = np.where(draw < self.mask_share + self.random_share, token, label)
        input_ids = rows.copy()
        input_ids[row, position] = np.where(draw < self.mask_share, self.mask_id, shown)

        used = np.arange(slots) < masked_of_row[:, None]
        masked_positions = np.zeros(used.shape, np.int64)
        masked_positions[used] = position
        labels = np.full(used.shape, IGNORED_LABEL)
        labels[used] = label
        return MaskedRows(input_ids, masked_positions, labels)
