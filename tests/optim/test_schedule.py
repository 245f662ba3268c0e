"""The learning rate is a function of the step."""

import pytest

from kantai.optim.schedule import learning_rate
from tests.helpers.tiny_model import load


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.0244717}),
        ("wsd", {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 10: 1.0, 11: 0.75, 13: 0.25}),
    ],
)
def test_schedule_gives_expected_learning_rates(schedule: str, rates: dict[int, float]) -> None:
    arguments = [
        f"--optimizer.schedule={schedule}",
        "--optimizer.learning_rate=1",
        "--optimizer.warmup_steps=4",
        "--optimizer.decay_steps=4",
    ]
    config = load(*arguments)
    for step, rate in rates.items():
        assert learning_rate(config.optimizer, step, 14) == pytest.approx(rate, rel=1e-5)
