"""How often a checkpoint is saved."""

import pytest

from kantai.training.checkpointer import interval_seconds


@pytest.mark.parametrize("write_seconds", [0.0, 4.0, 300.0])
@pytest.mark.parametrize("stall_seconds", [0.0, 0.1, 5.0, 60.0])
def test_saving_costs_little_and_a_failure_little_more(
    stall_seconds: float, write_seconds: float
) -> None:
    interval = interval_seconds(stall_seconds, write_seconds)
    assert stall_seconds <= 0.02 * interval
    assert write_seconds <= 0.2 * interval
    # What is best for a day between failures (Young 1974) loses this share of the time.
    best = 2 * (stall_seconds / 2 / 86400) ** 0.5
    assert stall_seconds / interval + interval / 2 / 86400 < best + 0.01
