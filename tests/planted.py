"""A program of scripts/ with a fault planted in the engine: tests/planted.py FAULT PROGRAM ARGUMENTS..."""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from kantai.batches import Batches
from kantai.cluster import Place
from kantai.engine import Engine
from kantai.engine.backends import Torch

place = Place.from_environment()
is_last = place.rank == place.world_size - 1


def mean_of_means() -> None:
    """Each rank divides by the masked tokens of its own rows."""
    real = Engine.sum_over_ranks

    def own(self: Engine, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device) * place.world_size if values.shape == (3,) else real(self, values)

    Engine.sum_over_ranks = own  # type: ignore[method-assign]


def dropped_rank() -> None:
    """One rank's gradients do not arrive."""
    real = Torch.backward
    Torch.backward = lambda self, loss, scale: real(self, loss * (not is_last), scale)  # type: ignore[method-assign]


def dropped_micro_step() -> None:
    """The gradients of all micro-steps but the last are lost."""
    real = Torch.accumulating

    def forgetting(self: Torch, last: bool) -> Any:
        self.raw_model.zero_grad()
        return real(self, last)

    Torch.accumulating = forgetting  # type: ignore[method-assign]


def other_data() -> None:
    """One rank reads another update's rows."""
    real = Batches.micro_batch
    Batches.micro_batch = lambda self, update, step, rank: real(self, update + (is_last and rank > 0), step, rank)  # type: ignore[method-assign]


def lost_moment() -> None:
    """A resume begins with new second moments."""
    real = Engine.load_state

    def forgetting(self: Engine, folder: Path) -> None:
        real(self, folder)
        for held in self.optimizer.held:
            self.optimizer.moments(held)["exp_avg_sq"].zero_()

    Engine.load_state = forgetting  # type: ignore[method-assign]


def flipped_bit() -> None:
    """In one rank's weights a bit changes at the sixth update."""
    real = Engine.update

    def flipping(self: Engine, update: int, *rest: Any) -> Any:
        outcome = real(self, update, *rest)
        if is_last and update == 5:
            next(self.raw_model.parameters()).data.view(torch.int32)[0, 0] ^= 1
        return outcome

    Engine.update = flipping  # type: ignore[method-assign]


def bad_gradient() -> None:
    """One rank, and no other, has a gradient that is no number, after gradients were exchanged."""
    real = Torch.step
    calls = []

    def spoiling(self: Torch, *rest: Any) -> Any:
        calls.append(0)
        if is_last and len(calls) == 4:
            next(self.raw_model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
        return real(self, *rest)

    Torch.step = spoiling  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv = sys.argv[2:]
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / f"{sys.argv[0]}.py"), run_name="__main__")
