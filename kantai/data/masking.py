"""Which tokens are hidden? RoBERTa's dynamic masking, from random numbers keyed by (seed, epoch, sample id)."""

import unicodedata
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders

from kantai.data import rng

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
UInt8s = npt.NDArray[np.uint8]
IGNORED_LABEL = -100  # PyTorch's cross-entropy skips it
MEAN_SPAN_WORDS = 3.8  # SpanBERT's: a geometric distribution of p = 0.2, clipped at 10
MAX_WORD_TOKENS = 8  # a longer word is masked in pieces, so that few slots are kept free for the word that passes the row's share
_SCHEDULED_MULTIPLE_OF = 8  # slots, so that a changing ratio gives few distinct shapes
# What a token begins with, and what may go on where it ends; 0: nothing, it stands by itself.
_LETTER, _NUMBER, _OTHER, _WHITESPACE, _SINGLE = (1 << bit for bit in range(5))
_INK = _LETTER | _NUMBER | _OTHER
_CONTRACTIONS = frozenset(("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"))


@dataclass(frozen=True, eq=False)
class Words:
    """Where words begin in rows of ids: the words of GPT-2's pre-tokenizer (``ByteLevel``), told from neighbouring tokens alone.

    A token goes on the word before it if it begins, without a space, with the class of character (letter, number, whitespace or other) that
    the one before ends with, or if that one is a lone space. This differs from the pre-tokenizer where a contraction is several tokens
    (``'`` and ``ll`` are two words then), and where a character is: its parts are taken for letters, whatever it is.
    """

    begins: UInt8s  # [vocabulary], a class; _SINGLE with it for a single whitespace character; 0 for what always begins a word
    goes_on: UInt8s  # [vocabulary], classes that a token going on this one's word begins with

    @classmethod
    def of(cls, tokenizer: Tokenizer, special_ids: tuple[int, ...]) -> "Words":
        """Tables of a byte-level tokenizer's vocabulary; a special token is a word by itself."""
        decode = decoders.ByteLevel().decode
        texts = [decode([tokenizer.id_to_token(token) or ""]) for token in range(tokenizer.get_vocab_size())]
        kinds = np.array([_begins_and_goes_on(text) for text in texts], np.uint8)
        kinds[list(special_ids)] = 0
        return cls(kinds[:, 0].copy(), kinds[:, 1].copy())

    def starts(self, rows: Int64s) -> Bools:
        """Which tokens begin a word, [rows, length]; special tokens and the first of a row do."""
        begins, goes_on = self.begins.take(rows), self.goes_on.take(rows)
        starts = np.ones(rows.shape, np.bool_)
        np.equal(begins[:, 1:] & goes_on[:, :-1], 0, out=starts[:, 1:])
        # Whitespace leaves its last character to the word that follows, or, where that is no space, to itself.
        starts[:, 1:-1] |= (begins[:, 1:-1] >= _SINGLE) & (begins[:, 2:] & _INK != 0)
        return starts


def _begins_and_goes_on(text: str) -> tuple[int, int]:
    if text.isspace():
        return _WHITESPACE | (_SINGLE if len(text) == 1 else 0), _WHITESPACE | (_INK if text == " " else 0)
    begins = 0 if text[:1] in ("", " ") else _class(text[0])
    return begins, 0 if text in {"", *_CONTRACTIONS} else _class(text[-1])


def _class(character: str) -> int:
    if character.isspace():
        return _WHITESPACE
    if character == "\ufffd":  # part of a character
        return _LETTER
    return {"L": _LETTER, "N": _NUMBER}.get(unicodedata.category(character)[0], _OTHER)


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, and what it is to say about them."""

    input_ids: Int64s  # [rows, length]
    masked_positions: Int64s  # [rows, slots], 0 where a row has fewer
    labels: Int64s  # [rows, slots], IGNORED_LABEL where a row has fewer


@dataclass(frozen=True)
class Masker:
    """Hides a share of the tokens of every row, behind ``<mask>``, a random token or themselves (BERT's 80/10/10).

    Units are hidden in random order until ``ratio`` times the row's ordinary tokens are. That number is rounded up or down at random, so
    that the share is right on average for rows of any length. A unit is

    - a token;
    - a word (BERT's whole-word masking), or a piece of 8 tokens where a word is longer. The word that would pass the number is hidden with
      the probability that keeps the share right on average;
    - a span of words (SpanBERT, Joshi et al. 2020): a row is cut at one in 3.8 of its word starts, at random. The last span is cut short.
      A span draws one of the three kinds of replacement as a whole, where the other units draw it for each token.

    No unit reaches past a special token. Rows of one length have one number of slots, so that the shapes given to the model do not change.
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
    final_ratio: float | None = None  # reached linearly at the last of max_steps; None: ratio throughout
    max_steps: int = 1

    def ratio_at(self, step: int) -> float:
        """Share of the tokens that is hidden in a step, counted from 0."""
        if self.final_ratio is None:
            return self.ratio
        done = min(1.0, step / max(1, self.max_steps - 1))
        return (1 - done) * self.ratio + done * self.final_ratio

    def slots(self, length: int, step: int) -> int:
        """Room for the masked tokens of a row of ``length`` tokens, the first of which is ``<s>``."""
        slots = _most(self.ratio_at(step), length) + (MAX_WORD_TOKENS - 1 if self.unit == "word" else 0)
        if self.final_ratio is not None:
            slots = -(-slots // _SCHEDULED_MULTIPLE_OF) * _SCHEDULED_MULTIPLE_OF
        return min(slots, length)

    def __call__(self, rows: Int64s, epochs: Int64s, samples: Int64s, step: int) -> MaskedRows:
        """Mask rows, each by itself: a pure function of the row, its epoch and sample id, the seed and the step's ratio.

        Args:
            rows: ids, [rows, length], the first of each ``<s>``; special tokens and padding are never masked.
            epochs: of each row, [rows].
            samples: sample id of each row, [rows].
            step: counted from 0; decides the ratio.
        """
        keys = rng.bits(rng.fold(self.seed, epochs, samples), np.arange(5)[:, None])
        count_key, place_key, kind_key, word_key, cut_key = keys
        ordinary = ~np.isin(rows, self.special_ids)
        starts = ordinary if self.unit == "token" else self._unit_starts(rows, ordinary, cut_key)
        units, taken = self._choose(starts, ordinary, self.ratio_at(step), place_key, rng.uniform(count_key)[:, None])

        # From here on one entry a masked token.
        taken_of_row = taken.sum(1)
        row = np.repeat(np.arange(len(rows)), taken_of_row)
        unit = np.repeat(units.ravel(), taken.ravel())
        first_entry = np.cumsum(taken) - taken.ravel()
        position = unit + np.arange(len(unit)) - np.repeat(first_entry, taken.ravel())
        hidden = rows[row, position]
        kind = rng.uniform(rng.bits(kind_key[row], unit if self.unit == "span" else position))
        word = rng.below(rng.bits(word_key[row], position), self.vocab_size)
        shown = np.where(kind < self.mask_share, self.mask_id, np.where(kind < self.mask_share + self.random_share, word, hidden))

        input_ids = rows.copy()
        input_ids[row, position] = shown
        filled = np.arange(self.slots(rows.shape[1], step)) < taken_of_row[:, None]
        positions, labels = np.zeros(filled.shape, np.int64), np.full(filled.shape, IGNORED_LABEL)
        positions[filled], labels[filled] = position, hidden
        return MaskedRows(input_ids, positions, labels)

    def _choose(
        self, starts: Bools, ordinary: Bools, ratio: float, place_key: rng.UInt64s, luck: npt.NDArray[np.float64]
    ) -> tuple[Int64s, Int64s]:
        """First tokens of the units to hide, and how many tokens of each, both [rows, most units]; luck is in [0, 1), [rows, 1]."""
        length = starts.shape[1]
        most = _most(ratio, length)
        wanted = ratio * ordinary.sum(1, keepdims=True)

        # The units with the smallest random numbers.
        ranks = rng.bits(place_key[:, None], np.arange(length))
        ranks[~starts] = np.iinfo(np.uint64).max
        nearest = np.argpartition(ranks, most - 1, axis=1)[:, :most]
        units = np.take_along_axis(nearest, np.argsort(np.take_along_axis(ranks, nearest, 1), axis=1), 1)

        if self.unit == "token":
            return units, (np.arange(most) < (wanted + luck).astype(np.int64)).astype(np.int64)
        lengths = np.take_along_axis(_lengths(starts | ~ordinary), units, 1)
        ends = np.cumsum(lengths, axis=1)
        if self.unit == "word":
            return units, np.where(ends <= wanted + luck * lengths, lengths, 0)
        return units, np.clip((wanted + luck).astype(np.int64) - (ends - lengths), 0, lengths)

    def _unit_starts(self, rows: Int64s, ordinary: Bools, cut_key: rng.UInt64s) -> Bools:
        """Which tokens begin a word, or a span of words, [rows, length]."""
        assert self.words is not None
        starts, places = self.words.starts(rows), np.arange(rows.shape[1])
        if self.unit == "span":
            cut = rng.bits(cut_key[:, None], places) < np.uint64(int(2**64 / MEAN_SPAN_WORDS))
            cut[:, 1:] |= ~ordinary[:, :-1]
            starts &= cut
        else:
            first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
            starts |= (places - first) % MAX_WORD_TOKENS == 0
        return starts & ordinary


def _most(ratio: float, length: int) -> int:
    """Most tokens that are masked in a row of ``length`` tokens, the first of which is ``<s>``."""
    return int(ratio * (length - 1)) + 1


def _lengths(boundaries: Bools) -> Int64s:
    """Distance from every boundary to the next one or the end of its row, 0 elsewhere, [rows, length]; every row begins with one."""
    places = np.flatnonzero(boundaries)
    lengths = np.zeros(boundaries.shape, np.int64)
    lengths.ravel()[places] = np.diff(places, append=boundaries.size)
    return lengths
