"""Which tokens are hidden? RoBERTa's dynamic masking, from random numbers keyed by (seed, epoch, sample id)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kantai import rng

Int64s = npt.NDArray[np.int64]

IGNORED_LABEL = -100  # PyTorch's cross-entropy passes over it


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, and what it is to say about them."""

    input_ids: Int64s  # [rows, length]
    masked_positions: Int64s  # [rows, most masked], 0 where a row has fewer
    labels: Int64s  # [rows, most masked], IGNORED_LABEL where a row has fewer


@dataclass(frozen=True)
class Masker:
    """Hides a fixed share of the tokens of every row, behind ``<mask>``, a random token or themselves (BERT's 80/10/10).

    The number of masked tokens of a row is ``ratio`` times its ordinary tokens, rounded up or down at random so that the share is right on
    average for rows of any length. It has one bound for rows of one length, so that the shapes given to the model do not change.
    """

    ratio: float
    mask_share: float
    random_share: float
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    seed: int

    def most_masked(self, length: int) -> int:
        """Most tokens that are masked in a row of ``length`` tokens, one of which is ``<s>``."""
        return int(self.ratio * (length - 1)) + 1

    def __call__(self, rows: Int64s, epochs: Int64s, samples: Int64s) -> MaskedRows:
        """Mask rows.

        Args:
            rows: ids, [rows, length]; special tokens and padding are never masked.
            epochs: of each row, [rows].
            samples: sample id of each row, [rows].
        """
        most = self.most_masked(rows.shape[1])
        count_key, place_key, kind_key, word_key = (rng.fold(self.seed, epochs, samples, purpose) for purpose in range(4))
        ordinary = ~np.isin(rows, self.special_ids)
        count = (self.ratio * ordinary.sum(1) + rng.uniform(count_key)).astype(np.int64)

        # The `count` ordinary positions with the smallest random numbers.
        ranks = rng.bits(place_key[:, None], np.arange(rows.shape[1]))
        ranks[~ordinary] = np.iinfo(np.uint64).max
        nearest = np.argpartition(ranks, most - 1, axis=1)[:, :most]
        nearest = np.take_along_axis(nearest, np.argsort(np.take_along_axis(ranks, nearest, 1), axis=1), 1)
        masked = np.arange(most) < count[:, None]

        positions = np.where(masked, nearest, 0)
        hidden = np.take_along_axis(rows, positions, 1)
        kind = rng.uniform(rng.bits(kind_key[:, None], positions))
        word = rng.below(rng.bits(word_key[:, None], positions), self.vocab_size)
        shown = np.where(kind < self.mask_share, self.mask_id, np.where(kind < self.mask_share + self.random_share, word, hidden))

        input_ids = rows.copy()
        input_ids[np.nonzero(masked)[0], positions[masked]] = shown[masked]
        return MaskedRows(input_ids, positions, np.where(masked, hidden, IGNORED_LABEL))
