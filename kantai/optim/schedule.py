"""The learning rate as a function of the update alone."""

import math

from kantai.config import schema as settings


def learning_rate(config: settings.Optimizer, update: int, total_updates: int) -> float:
    """The learning rate of an update, counted from 0: linear warm-up, then a decay that would reach 0 at ``total_updates``.

    ``linear`` and ``cosine`` decay from the end of the warm-up on; ``wsd`` (warm-up, stable, decay) stays at the peak until the last
    ``decay_updates`` and then falls linearly.
    """
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    decaying = total_updates - config.warmup_updates
    if config.schedule == "wsd":
        decaying = min(decaying, config.decay_updates or max(1, total_updates // 10))
    left = min(1.0, (total_updates - update) / max(1, decaying))
    if config.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * left
