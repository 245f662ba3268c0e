"""How do the weights move? Parameter groups, AdamW, and the learning rate as a function of the update alone."""

import math

import torch
from torch import nn

from kantai.config import Optimizer


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, but no bias and no layer norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate(config: Optimizer, update: int, total_updates: int) -> float:
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
