"""Which random number? Counter-based generators: a number is a pure function of (key, counter).

Nothing is stored or advanced, so any rank, worker or restart computes the same numbers, and seeking costs nothing.
The mixing function is SplitMix64's (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Float64s = npt.NDArray[np.float64]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
TokenIds = npt.NDArray[Any]  # uint16 or uint32, as the shards have them

# Constants are made once: of a call on few numbers, making them would be half of the time.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_ONE, _27, _30, _31 = (np.uint64(number) for number in (1, 27, 30, 31))


def bits(key: UInt64s, counter: npt.NDArray[np.integer]) -> UInt64s:
    """64 random bits for every (key, counter) pair; the two are broadcast against each other."""
    z = counter.astype(np.uint64)
    z += _ONE
    z *= _GOLDEN
    z = key + z
    shifted = np.empty_like(z)  # one for all steps: fresh memory costs more than the arithmetic
    z ^= np.right_shift(z, _30, out=shifted)
    z *= _MULTIPLIER_1
    z ^= np.right_shift(z, _27, out=shifted)
    z *= _MULTIPLIER_2
    z ^= np.right_shift(z, _31, out=shifted)
    return z


def fold(*parts: int | npt.NDArray[np.integer]) -> UInt64s:
    """One key out of several numbers, in their order; arrays among them are broadcast to an array of keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = bits(key, np.atleast_1d(np.asarray(part)))
    return key


def uniform(random_bits: UInt64s) -> npt.NDArray[np.float64]:
    """Random bits as numbers in [0, 1)."""
    return (random_bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(random_bits: UInt64s, bound: int) -> npt.NDArray[np.int64]:
    """Random bits as integers in [0, bound), for a bound up to 2**32 (multiply and shift; Lemire 2019)."""
    return (((random_bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of torch's generators for one micro-step, so that no generator state is ever saved."""
    return int(fold(seed, step, micro_step, rank)[0] >> np.uint64(1))
