"""Random numbers depend on their key only."""

import numpy as np

from kantai.data import rng


def test_random_numbers_match_splitmix64() -> None:
    """Rosetta Code lists the first numbers of seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert rng.bits(np.array([1234567], np.uint64), np.arange(5)).tolist() == published


def test_random_numbers_reach_and_keep_bounds() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert rng.uniform(ends).tolist() == [0.0, 1 - 2.0**-53]
    assert [rng.below(ends, bound).tolist() for bound in (1, 52_000, 2**32)] == [
        [0, 0],
        [0, 51_999],
        [0, 2**32 - 1],
    ]


def test_keys_depend_on_parts_and_order() -> None:
    keys = {
        int(rng.fold(*parts)[0])
        for parts in [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1), (1, 3, 2)]
    }
    assert len(keys) == 8
    assert rng.fold(1, np.array([2, 3]), 4).tolist() == [
        int(rng.fold(1, 2, 4)[0]),
        int(rng.fold(1, 3, 4)[0]),
    ]
