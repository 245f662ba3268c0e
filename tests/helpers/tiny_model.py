"""A model of a few hundred parameters, and gradients for it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kantai.config.loading import load_config
from kantai.config.schema import Config
from tests.helpers.commands import CONFIG

STEPS = 4


def load(*arguments: str) -> Config:
    return load_config(CONFIG, ["--data.shards=a", "--data.tokenizer=b", "--run_dir=c", *arguments])


class Tiny(nn.Module):
    """A model with RoBERTa's names: an embedding, a tall and a wide matrix, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embeddings = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.decoder = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.down(self.up(self.embeddings(ids)).relu())
        return self.decoder(self.LayerNorm(hidden))  # type: ignore[no-any-return]


def gradients() -> Iterator[list[Tensor]]:
    """Yield the gradients of each step: far from 0, and of another size for each parameter."""
    torch.manual_seed(2)
    for _ in range(STEPS):
        yield [
            torch.randn_like(parameter) * 10.0**number
            for number, parameter in enumerate(Tiny().parameters(), -5)
        ]


def trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Take all steps and return the model's state."""
    for found in gradients():
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return model.state_dict()
