"""The stateless shuffle gives every sample once an epoch, in random order and little memory."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kantai.data import rng
from kantai.data.shuffle import NO_SAMPLE, Sequential, Shuffled, permute

HUGE = 10**10


def chi_square_is_plausible(counts: np.ndarray) -> bool:
    """Return whether counts may come from equal chances, within 4 standard errors.

    About one fair sample in ten thousand fails.
    """
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def shuffled(samples: int, seed: int) -> Shuffled:
    """Return an order with all samples in one window."""
    return Shuffled(np.array([samples]), 1, seed)


@settings(max_examples=60)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, rng.fold(seed, epoch)).tolist()) == list(
        range(size)
    )


@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 65_536, 65_537]
)
def test_permute_is_a_bijection_around_powers_of_two(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, rng.fold(1, 2))), np.arange(size))


@pytest.mark.parametrize("size", [HUGE, 2**33, 2**33 + 1, 2**40])
def test_permute_spreads_huge_sizes_without_collisions(size: int) -> None:
    places = np.unique(
        np.concatenate(
            [
                np.arange(20_000),
                size - 1 - np.arange(20_000),
                np.linspace(0, size - 1, 20_000).astype(np.int64),
            ]
        )
    )
    found = permute(places, size, rng.fold(3))
    assert found.min() >= 0 and found.max() < size
    assert len(np.unique(found)) == len(places)
    assert chi_square_is_plausible(np.histogram(found, bins=100, range=(0, size))[0])


@settings(max_examples=60)
@given(
    samples_per_shard=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 1000),
    chunks=st.lists(st.integers(1, 200), min_size=1, max_size=20),
)
def test_epoch_gives_each_sample_once_in_any_chunks(
    samples_per_shard: list[int], window: int, seed: int, first: int, chunks: list[int]
) -> None:
    order = Shuffled(np.array(samples_per_shard), window, seed)
    samples = order.samples

    # The chunks of two epochs do not end where the epochs end.
    start = first * samples
    stop = (first + 2) * samples
    epochs = []
    ids = []
    while start < stop:
        for chunk in chunks:
            positions = np.arange(start, min(start + chunk, stop))
            found = order.at(positions)
            epochs += found[0].tolist()
            ids += found[1].tolist()
            start += len(positions)
    assert epochs == [first] * samples + [first + 1] * samples
    assert sorted(ids[:samples]) == sorted(ids[samples:]) == list(range(samples))


def test_order_differs_by_epoch_and_seed() -> None:
    places = np.arange(100)
    orders = {
        tuple(shuffled(100, seed).at(epoch * 100 + places)[1].tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_position_lookup_is_stateless() -> None:
    order = shuffled(1000, 7)
    whole = order.at(np.arange(5000))[1]
    scattered = np.array([4999, 0, 2500, 2500, 1])
    assert order.at(scattered)[1].tolist() == whole[scattered].tolist()


@pytest.mark.parametrize("size", [7, 20, 37, 64])
def test_each_position_draws_samples_uniformly(size: int) -> None:
    orders = shuffled(size, 5).at(np.arange(size * 1500))[1].reshape(-1, size)
    for place in (0, 1, size // 2, size - 1):
        assert chi_square_is_plausible(np.bincount(orders[:, place], minlength=size))


@pytest.mark.parametrize("size", [7, 20, 37, 64])
def test_neighbouring_positions_are_independent(size: int) -> None:
    orders = shuffled(size, 6).at(np.arange(size * 1500))[1].reshape(-1, size)
    steps = (orders[:, 1] - orders[:, 0]) % size
    assert chi_square_is_plausible(np.bincount(steps, minlength=size)[1:])

    # Equal positions of successive epochs are independent too.
    assert chi_square_is_plausible(
        np.bincount((orders[1:, 3] - orders[:-1, 3]) % size, minlength=size)
    )


def test_memory_is_independent_of_sample_count() -> None:
    def peak_bytes(samples: int) -> int:
        tracemalloc.start()
        shuffled(samples, 1).at(np.arange(samples - 64, samples + 64))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(HUGE) < 2 * peak_bytes(1000) < 1_000_000


def windows_of(order: Shuffled, epoch: int, per_window: int) -> list[set[int]]:
    """Return the shards of an epoch's samples by window. All shards must have equal size."""
    samples = order.at(epoch * order.samples + np.arange(order.samples))[1].reshape(-1, per_window)
    return [set((window // order.samples_per_shard[0]).tolist()) for window in samples]


@pytest.mark.parametrize("window", [1, 3, 4, 12, 100])
def test_window_reads_only_its_shards(window: int) -> None:
    order = Shuffled(np.full(12, 50), window, 3)
    per_window = 50 * min(window, 12)
    epochs = [windows_of(order, epoch, per_window) for epoch in range(30)]
    assert all(len(shards) == min(window, 12) for windows in epochs for shards in windows)
    assert all(set().union(*windows) == set(range(12)) for windows in epochs)
    # Other shards meet in each epoch.
    assert len({tuple(map(frozenset, windows)) for windows in epochs}) > 25 or window >= 12


def test_window_positions_draw_samples_uniformly() -> None:
    order = Shuffled(np.full(8, 10), 2, 9)  # 4 windows of 20 samples
    samples = order.at(np.arange(80 * 800))[1].reshape(-1, 80)
    for place in (0, 19, 20, 45):
        assert chi_square_is_plausible(np.bincount(samples[:, place], minlength=80))

    # The shards of a window's first two samples.
    together = samples[:, 0] // 10 * 8 + samples[:, 1] // 10
    assert chi_square_is_plausible(np.bincount(samples[:, 0] // 10, minlength=8))
    same = (samples[:, 0] // 10 == samples[:, 1] // 10).mean()
    assert abs(same - 9 / 19) < 0.03 and len(np.unique(together)) == 64


def test_windows_and_positions_convert_both_ways() -> None:
    order = Shuffled(np.array([5, 0, 7, 3, 9, 1]), 2, 4)
    starts = [order.position_of(epoch, window) for epoch in range(3) for window in range(3)]
    assert starts[::3] == [0, 25, 50] and starts == sorted(starts)
    for (number, start), stop in zip(enumerate(starts), [*starts[1:], 75], strict=True):
        assert order.next_window(start)[0] == number // 3 or start == stop
        if start < stop:
            assert order.position_of(*order.next_window(start)) == start
            assert order.position_of(*order.next_window(start + 1)) == stop
            assert order.position_of(*order.next_window(stop - 1)) in (stop, stop - 1)


def test_100000_shards_take_little_memory() -> None:
    """10^12 tokens take about 30,000 shards of 65,000 sequences."""
    order = Shuffled(np.full(100_000, 65_000), 64, 1)
    tracemalloc.start()
    epochs, samples = order.at(10**9 + np.arange(8192))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000 and (epochs == 0).all() and len(np.unique(samples)) == 8192
    assert len(np.unique(samples // 65_000)) == 64


def test_sequential_order_ends_after_last_sample() -> None:
    epochs, samples = Sequential(5).at(np.array([0, 3, 4, 5, 6, 1000]))
    assert samples.tolist() == [0, 3, 4, NO_SAMPLE, NO_SAMPLE, NO_SAMPLE]
    assert epochs.tolist() == [0] * 6
    assert NO_SAMPLE < 0
