"""The monitor limits spikes and tells when a run has gone bad."""

import math

import pytest

from kantai.distributed.engine import StepResult
from kantai.training.loss_monitor import LossMonitor


def result(loss: float, grad_norm: float = 1.0, *, skipped: bool = False) -> StepResult:
    return StepResult(loss, 0.1, grad_norm, 10, 10, skipped, 1.0)


def test_limits_follow_median_of_last_100_good_steps() -> None:
    monitor = LossMonitor(spike_factor=20.0, max_skipped=3)
    for step in range(99):
        monitor.observe(result(8.0, 2.0 + step % 3))
        assert monitor.limits() == (math.inf, math.inf)
    monitor.observe(result(1e9, skipped=True))
    assert monitor.limits() == (math.inf, math.inf)
    monitor.observe(result(8.0, 3.0))
    assert monitor.limits() == (160.0, 60.0)
    for _ in range(100):
        monitor.observe(result(4.0, 1.0))
    assert monitor.limits() == (80.0, 20.0)


def test_infinite_gradient_norm_is_ignored() -> None:
    monitor = LossMonitor(spike_factor=2.0, max_skipped=3)
    for _ in range(100):
        monitor.observe(result(8.0, math.inf))
    assert monitor.limits() == (16.0, math.inf)


def test_missing_spike_factor_disables_limits() -> None:
    monitor = LossMonitor(spike_factor=None, max_skipped=3)
    monitor.restart([1.0] * 100, [1.0] * 100)
    assert monitor.limits() == (math.inf, math.inf)


@pytest.mark.parametrize("max_skipped", [1, 3])
def test_run_goes_bad_after_max_skipped_steps(max_skipped: int) -> None:
    monitor = LossMonitor(spike_factor=20.0, max_skipped=max_skipped)
    for _ in range(max_skipped - 1):
        monitor.observe(result(math.nan, skipped=True))
    assert not monitor.has_gone_bad
    monitor.observe(result(8.0))
    for _ in range(max_skipped):
        assert not monitor.has_gone_bad
        monitor.observe(result(math.nan, skipped=True))
    assert monitor.has_gone_bad
    monitor.restart([8.0], [1.0])
    assert not monitor.has_gone_bad
