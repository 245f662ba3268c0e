"""Sample order: a stateless shuffle. The n-th sample of a run is computed, not looked up.

A Feistel network permutes [0, 2^k), and cycle walking restricts it to [0, samples) (Black, Rogaway:
Ciphers with Arbitrary Finite Domains, 2002). It needs no memory and no history: resuming at step
10^6 costs what starting costs.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kantai.data import rng
from kantai.data.rng import Int64s, UInt64s

NO_SAMPLE = -1
_ROUNDS = 8
_SHARDS, _SAMPLES = 0, 1  # what a key permutes


class Order(Protocol):
    """An order of samples."""

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position; ``NO_SAMPLE`` beyond the last."""
        ...


class Shuffled:
    """Every sample once an epoch, in an order that is a pure function of (seed, epoch).

    Shards are shuffled first, and then samples within windows of ``window`` consecutive shards: a
    node needs only the shards of one window at a time. Memory grows with the number of shards, not
    of samples.
    """

    def __init__(self, samples_per_shard: Int64s, window: int, seed: int) -> None:
        self.samples_per_shard = samples_per_shard
        self.window = window
        self.seed = seed
        self.first_sample = _starts(samples_per_shard)
        self.samples = int(self.first_sample[-1])
        self._epochs: dict[int, _Epoch] = {}

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position, from 0 without end."""
        epochs, places = np.divmod(positions, self.samples)
        samples = np.empty_like(places)
        for of_epoch in _groups(epochs):
            number = int(epochs[of_epoch[0]])
            first_places = self._epoch(number).first_place
            windows = np.searchsorted(first_places, places[of_epoch], side="right") - 1
            for group in _groups(windows):
                of_window = of_epoch[group]
                window = int(windows[group[0]])
                samples[of_window] = self._in_window(number, window, places[of_window])
        return epochs, samples

    def next_window(self, position: int) -> tuple[int, int]:
        """Epoch and number of the first window that begins at a position or after it."""
        number, place = divmod(position, self.samples)
        first_places = self._epoch(number).first_place
        window = int(np.searchsorted(first_places, place, side="left"))
        return (number, window) if window < len(first_places) - 1 else (number + 1, 0)

    def position_of(self, epoch: int, window: int) -> int:
        """The position at which a window begins."""
        return epoch * self.samples + int(self._epoch(epoch).first_place[window])

    def _in_window(self, number: int, window: int, places: Int64s) -> Int64s:
        """Sample ids at places of an epoch that lie in one of its windows."""
        epoch = self._epoch(number)
        shards = epoch.shards[window * self.window : (window + 1) * self.window]
        starts = _starts(self.samples_per_shard[shards])
        key = rng.fold(self.seed, _SAMPLES, number, window)
        moved = permute(places - epoch.first_place[window], int(starts[-1]), key)
        shard = np.searchsorted(starts, moved, side="right") - 1
        return self.first_sample[shards[shard]] + moved - starts[shard]

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            count = len(self.samples_per_shard)
            shards = permute(np.arange(count), count, rng.fold(self.seed, _SHARDS, number))
            starts = _starts(self.samples_per_shard[shards])
            windows = np.append(np.arange(0, count, self.window), count)
            previous = {key: kept for key, kept in self._epochs.items() if key == number - 1}
            self._epochs = {**previous, number: _Epoch(shards, starts[windows])}
        return self._epochs[number]


@dataclass(frozen=True)
class _Epoch:
    shards: Int64s  # in their order
    first_place: Int64s  # of each window; one more entry holds the number of samples


@dataclass(frozen=True)
class Sequential:
    """Every sample once, in the order of the shards: the order of evaluation."""

    samples: int

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch 0 and the position itself as sample id, up to the last sample."""
        samples = np.where(positions < self.samples, positions, NO_SAMPLE)
        return np.zeros_like(positions), samples


def permute(places: Int64s, size: int, key: UInt64s) -> Int64s:
    """Places under the permutation of [0, size) that a key names."""
    bits = max(2, (size - 1).bit_length())
    left_bits = bits // 2
    right_bits = bits - left_bits
    shift = np.uint64(right_bits)
    # The halves change sides in every round.
    masks = [np.uint64((1 << half) - 1) for half in (left_bits, right_bits)]
    rounds = [(rng.bits(key, np.array([number])), masks[number % 2]) for number in range(_ROUNDS)]

    def encipher(value: UInt64s) -> UInt64s:
        left = value >> shift
        right = value & masks[1]
        for round_key, mask in rounds:
            left, right = right, left ^ (rng.bits(round_key, right) & mask)
        return (left << shift) | right

    result = encipher(places.astype(np.uint64))
    while (outside := result >= size).any():  # cycle walking
        result[outside] = encipher(result[outside])
    return result.astype(np.int64)


def _starts(counts: Int64s) -> Int64s:
    """Start of each of several runs laid end to end, and the end of the last."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _groups(values: Int64s) -> list[Int64s]:
    """Indices of equal values, one group for each value."""
    by_value = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[by_value])) + 1
    return [group for group in np.split(by_value, edges) if len(group)]
