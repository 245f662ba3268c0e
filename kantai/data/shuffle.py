"""Which sample comes when? A stateless shuffle: the n-th sample of a run is computed, not looked up.

A Feistel network permutes [0, 2^k) and cycle walking restricts it to [0, samples) (Black, Rogaway: Ciphers with Arbitrary Finite
Domains, 2002). It needs no memory and no history, so that resuming at step 10^6 costs what starting costs.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kantai.data import rng

Int64s = npt.NDArray[np.int64]
NO_SAMPLE = -1
_ROUNDS = 8
_SHARDS, _SAMPLES = 0, 1  # what a key permutes


class Shuffled:
    """Every sample once an epoch, in an order that is new each epoch and a pure function of (seed, epoch).

    Shards are shuffled, and then samples within windows of ``window`` shards that follow each other, so that the shards of a window
    are all that must be at hand at a time. What is kept of an epoch grows with its shards, not with its samples.
    """

    def __init__(self, samples_per_shard: Int64s, window: int, seed: int) -> None:
        self.samples_per_shard, self.window, self.seed = samples_per_shard, window, seed
        self.first_sample = _starts(samples_per_shard)
        self.samples = int(self.first_sample[-1])
        self._epochs: dict[int, _Epoch] = {}

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch and sample id at every position, from 0 without end."""
        epochs, places = np.divmod(positions, self.samples)
        samples = np.empty_like(places)
        for of_epoch in _groups(epochs):
            number = int(epochs[of_epoch[0]])
            epoch = self._epoch(number)
            windows = np.searchsorted(epoch.first_place, places[of_epoch], side="right") - 1
            for of_window in _groups(windows):
                here, window = of_epoch[of_window], int(windows[of_window[0]])
                shards = self._shards(epoch, window)
                starts = _starts(self.samples_per_shard[shards])
                key = rng.fold(self.seed, _SAMPLES, number, window)
                moved = permute(places[here] - epoch.first_place[window], int(starts[-1]), key)
                shard = np.searchsorted(starts, moved, side="right") - 1
                samples[here] = self.first_sample[shards[shard]] + moved - starts[shard]
        return epochs, samples

    def next_window(self, position: int) -> tuple[int, int]:
        """Epoch and number of the first window that begins at a position or after it."""
        number, place = divmod(position, self.samples)
        epoch = self._epoch(number)
        window = int(np.searchsorted(epoch.first_place, place, side="left"))
        return (number, window) if window < len(epoch.first_place) - 1 else (number + 1, 0)

    def position_of(self, epoch: int, window: int) -> int:
        """The position at which a window begins."""
        return epoch * self.samples + int(self._epoch(epoch).first_place[window])

    def _shards(self, epoch: "_Epoch", window: int) -> Int64s:
        return epoch.shards[window * self.window : (window + 1) * self.window]

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            count = len(self.samples_per_shard)
            shards = permute(np.arange(count), count, rng.fold(self.seed, _SHARDS, number))
            starts = _starts(self.samples_per_shard[shards])
            windows = np.append(np.arange(0, count, self.window), count)
            self._epochs = {**{k: v for k, v in self._epochs.items() if k == number - 1}, number: _Epoch(shards, starts[windows])}
        return self._epochs[number]


@dataclass(frozen=True)
class _Epoch:
    shards: Int64s  # in their order
    first_place: Int64s  # of each window, and behind the last


@dataclass(frozen=True)
class Sequential:
    """Every sample once, in the order of the shards: what evaluation uses."""

    samples: int

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch 0 and the position itself as sample id, up to the last sample."""
        return np.zeros_like(positions), np.where(positions < self.samples, positions, NO_SAMPLE)


def permute(places: Int64s, size: int, key: rng.UInt64s) -> Int64s:
    """Where each of ``places`` goes under the permutation of [0, size) that a key names."""
    bits = max(2, (size - 1).bit_length())
    left_bits, right_bits = bits // 2, bits - bits // 2
    shift = np.uint64(right_bits)
    masks = [np.uint64((1 << half) - 1) for half in (left_bits, right_bits)]  # the halves change sides in every round
    rounds = [(rng.bits(key, np.array([number])), masks[number % 2]) for number in range(_ROUNDS)]

    def encipher(value: rng.UInt64s) -> rng.UInt64s:
        left, right = value >> shift, value & masks[1]
        for round_key, mask in rounds:
            left, right = right, left ^ (rng.bits(round_key, right) & mask)
        return (left << shift) | right

    result = encipher(places.astype(np.uint64))
    while (outside := result >= size).any():  # walk on
        result[outside] = encipher(result[outside])
    return result.astype(np.int64)


def _starts(counts: Int64s) -> Int64s:
    """Where each of several runs of items begins when they are laid end to end, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _groups(values: Int64s) -> list[Int64s]:
    """Where equal values stand, one group for each."""
    by_value = np.argsort(values, kind="stable")
    return [group for group in np.split(by_value, np.flatnonzero(np.diff(values[by_value])) + 1) if len(group)]
