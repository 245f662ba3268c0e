"""The save interval bounds the cost of saves and failures."""

import pytest

from kantai.training.checkpointer import interval_seconds


@pytest.mark.parametrize("write_seconds", [0.0, 4.0, 300.0])
@pytest.mark.parametrize("stall_seconds", [0.0, 0.1, 5.0, 60.0])
def test_save_interval_bounds_cost_of_saves_and_failures(
    stall_seconds: float, write_seconds: float
) -> None:
    interval = interval_seconds(stall_seconds, write_seconds)
    assert stall_seconds <= 0.02 * interval
    assert write_seconds <= 0.2 * interval

    # With one failure a day, the best interval loses this share of the time (Young 1974).
    best = 2 * (stall_seconds / 2 / 86400) ** 0.5
    assert stall_seconds / interval + interval / 2 / 86400 < best + 0.01


def test_checkpoint_at_evaluation_waits_only_for_its_cost() -> None:
    assert interval_seconds(0.1, 1.0, is_scored=True) == 5.0
    assert interval_seconds(1.0, 1.0, is_scored=True) == 50.0
    assert interval_seconds(30.0, 1.0, is_scored=True) == interval_seconds(30.0, 1.0) == 1500.0
