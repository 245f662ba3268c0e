"""The learning rate as a function of the step alone."""

import math

from kantai.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a decay that would reach 0 at ``max_steps``.

    ``linear`` and ``cosine`` decay from the end of the warm-up on; ``wsd`` (warm-up, stable, decay) stays at the peak until the last
    ``decay_steps`` and then falls linearly.
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
