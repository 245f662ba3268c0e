"""Which sample comes when? A stateless shuffle: the n-th sample of a run is computed, not looked up.

A Feistel network permutes [0, 2^k) and cycle walking restricts it to [0, samples) (Black, Rogaway: Ciphers with Arbitrary Finite
Domains, 2002). It needs no memory and no history, so that resuming at update 10^6 costs what starting costs.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kantai import rng

Int64s = npt.NDArray[np.int64]

NO_SAMPLE = -1
_ROUNDS = 8


class Order(Protocol):
    """Which sample stands at a position of the run."""

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position; the id is ``NO_SAMPLE`` where there is none."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every sample once an epoch, in an order that is new each epoch and a pure function of (seed, epoch)."""

    samples: int
    seed: int

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position, from 0 without end."""
        epochs, places = positions // self.samples, positions % self.samples
        return epochs, permute(places, self.samples, rng.fold(self.seed, epochs))


@dataclass(frozen=True)
class Sequential:
    """Every sample once, in the order of the shards: what evaluation uses."""

    samples: int

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch 0 and the position itself as sample id, up to the last sample."""
        return np.zeros_like(positions), np.where(positions < self.samples, positions, NO_SAMPLE)


def permute(places: Int64s, size: int, keys: rng.UInt64s) -> Int64s:
    """Where each of ``places`` goes under the permutation of [0, size) that its key names."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    rounds = [rng.bits(keys, np.array([number])) for number in range(_ROUNDS)]

    def encipher(value: rng.UInt64s, of: npt.NDArray[np.bool_]) -> rng.UInt64s:
        left, right = value >> half, value & low
        for key in rounds:
            left, right = right, left ^ (rng.bits(np.broadcast_to(key, of.shape)[of], right) & low)
        return (left << half) | right

    result = places.astype(np.uint64)
    outside = np.ones(result.shape, np.bool_)  # those still to be walked on
    while outside.any():
        result[outside] = encipher(result[outside], outside)
        outside = result >= size
    return result.astype(np.int64)
