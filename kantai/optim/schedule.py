"""The learning rate schedule: linear warmup, then linear, cosine or wsd decay."""

import math

from kantai.config.schema import OptimizerConfig
from kantai.errors import UserError


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of a step, counted from 0: a function of the step alone.

    It rises linearly during warmup, then decays and would reach 0 at ``max_steps``. ``linear``
    and ``cosine`` decay from the end of the warmup on. ``wsd`` (warmup, stable, decay) stays at
    the peak until the last ``decay_steps`` and then falls linearly.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying = max_steps - config.warmup_steps
    if config.schedule == "wsd":
        decaying = min(decaying, config.decay_steps or max(1, max_steps // 10))
    left = min(1.0, (max_steps - step) / max(1, decaying))
    if config.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * left


def check_schedule(config: OptimizerConfig, max_steps: int) -> None:
    """Refuse a schedule whose warmup never ends."""
    if config.warmup_steps >= max_steps > 1:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} is not less than the run's {max_steps} "
            "steps; lower it"
        )
