"""How often is a checkpoint made?"""

import pytest

from kantai.training.checkpointer import best_interval_seconds


@pytest.mark.parametrize("cost", [0.2, 5.0, 60.0])
@pytest.mark.parametrize("mtbf_hours", [1.0, 24.0, 1000.0])
def test_no_other_interval_loses_less_time_to_saving_and_to_failures(cost: float, mtbf_hours: float) -> None:
    def lost(interval: float) -> float:
        """Share of the time: each interval costs a save, and each failure half an interval."""
        return cost / interval + interval / 2 / (3600 * mtbf_hours)

    best = best_interval_seconds(cost, 3600 * mtbf_hours)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))
