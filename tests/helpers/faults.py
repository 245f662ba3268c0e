"""Run a program of scripts/ with a fault in the engine.

tests/helpers/faults.py FAULT PROGRAM ARGUMENTS...
"""

import contextlib
import runpy
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kantai.checkpoint.state import Snapshot
from kantai.cluster.environment import RankInfo
from kantai.data.batches import Batches
from kantai.diagnostics.faults import loss_multiplied
from kantai.distributed.backends import DeepSpeedZero, PyTorch
from kantai.distributed.engine import Engine

rank_info = RankInfo.from_environment()
is_last = rank_info.rank == rank_info.world_size - 1
process_stack = contextlib.ExitStack()  # its contexts last until this process ends


def mean_of_means() -> None:
    """Each rank divides the loss by the masked tokens of its own rows."""
    real = Engine.sum_over_ranks

    def own(self: Engine, values: torch.Tensor) -> torch.Tensor:
        return (
            values.to(self.device) * rank_info.world_size
            if values.shape == (3,)
            else real(self, values)
        )

    Engine.sum_over_ranks = own  # type: ignore[method-assign]


def dropped_rank() -> None:
    """One rank's gradients do not arrive."""

    def drop(kind: type[PyTorch]) -> None:
        real = kind.backward

        def dropping(self: Any, loss: torch.Tensor, scale: Any) -> Any:
            return real(self, loss * (not is_last), scale)

        kind.backward = dropping  # type: ignore[method-assign]

    drop(PyTorch)
    drop(DeepSpeedZero)


def dropped_micro_step() -> None:
    """The gradients of all micro-steps but the last are lost."""
    real = PyTorch.accumulating

    def forgetting(self: PyTorch, last: bool) -> Any:
        self._optimizer.zero_grad()
        return real(self, last)

    PyTorch.accumulating = forgetting  # type: ignore[method-assign]


def other_data() -> None:
    """One rank reads another step's rows."""
    real = Batches.micro_batch
    Batches.micro_batch = lambda self, step, micro_step, rank: real(
        self, step + (is_last and rank > 0), micro_step, rank
    )  # type: ignore[method-assign]


def lost_moment() -> None:
    """A resume begins with new second moments."""
    real = Engine.load_state

    def forgetting(self: Engine, folder: Path) -> None:
        real(self, folder)
        for sharded in self.optimizer.layout.tensors:
            self.optimizer.moments(sharded)["exp_avg_sq"].zero_()

    Engine.load_state = forgetting  # type: ignore[method-assign]


def flipped_bit() -> None:
    """A bit in the last rank's weights flips at the sixth step."""
    real = Engine.train_step

    def flipping(self: Engine, step: int, *rest: Any) -> Any:
        result = real(self, step, *rest)
        if is_last and step == 5:
            next(self.raw_model.parameters()).data.view(torch.int32)[0, 0] ^= 1
        return result

    Engine.train_step = flipping  # type: ignore[method-assign]


def bad_gradient() -> None:
    """One rank alone has a NaN gradient after the ranks have exchanged gradients."""
    real = PyTorch.step
    calls = []

    def spoiling(self: PyTorch, *rest: Any) -> Any:
        calls.append(0)
        if is_last and len(calls) == 4:
            self._parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
        return real(self, *rest)

    PyTorch.step = spoiling  # type: ignore[method-assign]


def poisoned_weight(at_step: int = 0) -> None:
    """The last rank alone has an infinite weight after the first step, as a device may make it."""
    real = Engine.train_step
    struck: list[int] = []

    def poisoning(self: Engine, step: int, *rest: Any) -> Any:
        result = real(self, step, *rest)
        if is_last and step == at_step and not struck:
            struck.append(step)
            sharded = self.optimizer.layout.tensors[0]
            offset = next(part.offset for part in sharded.slices if part.numel)
            sharded.tensor.data.view(-1)[offset] = float("inf")
        return result

    Engine.train_step = poisoning  # type: ignore[method-assign]


def poisoned_weight_at_the_end() -> None:
    """The same after the last of six steps."""
    poisoned_weight(5)


def pickles_refused() -> None:
    """Ranks can exchange no pickles."""

    def refusing(*_: object, **__: object) -> None:
        raise AssertionError("a pickle is exchanged")

    c10d = torch.distributed.distributed_c10d
    for name in ("_object_to_tensor", "_tensor_to_object"):
        process_stack.enter_context(patch.object(c10d, name, refusing))


def third_engine_refused() -> None:
    """Memory holds two engines at once; this is a limit and no fault."""
    real = Engine.__init__
    alive = weakref.WeakSet[Any]()

    def counting(self: Engine, *rest: Any, **named: Any) -> None:
        assert len(alive) < 2, "a third engine"
        real(self, *rest, **named)
        alive.add(self.optimizer.layout.tensors[0].tensor)  # any holder of it counts

    Engine.__init__ = counting  # type: ignore[method-assign]


def bad_gradient_and_stop() -> None:
    """One rank has a NaN gradient as in ``bad_gradient``, and the run gets a STOP file then."""
    bad_gradient()
    real = PyTorch.step
    calls = []
    (run,) = (
        Path(argument.removeprefix("--run_dir="))
        for argument in sys.argv
        if argument.startswith("--run_dir=")
    )

    def asking(self: PyTorch, *rest: Any) -> Any:
        calls.append(0)
        if rank_info.is_main and len(calls) == 4:
            (run / "STOP").touch()
        return real(self, *rest)

    PyTorch.step = asking  # type: ignore[method-assign]


def exploding_loss() -> None:
    """One rank's loss is a thousand times too large at the 104th step."""
    process_stack.enter_context(loss_multiplied(1000.0, lambda step, _: is_last and step == 103))


def endless_save() -> None:
    """Each rank writes its part of the first checkpoint and then hangs before its publication."""
    real = Snapshot.save

    def waiting(self: Snapshot, folder: Path) -> Any:
        real(self, folder)
        while True:
            time.sleep(1)

    Snapshot.save = waiting  # type: ignore[method-assign]


def hanging_rank() -> None:
    """One rank hangs before its fourth step."""
    real = Engine.train_step

    def hanging(self: Engine, step: int, *rest: Any) -> Any:
        while is_last and step == 3:
            time.sleep(1)
        return real(self, step, *rest)

    Engine.train_step = hanging  # type: ignore[method-assign]


@contextlib.contextmanager
def planted_fault(name: str) -> Iterator[None]:
    """Plant one of these faults; remove it afterwards."""
    kinds = (Batches, DeepSpeedZero, Engine, PyTorch, Snapshot)
    before = [dict(vars(kind)) for kind in kinds]
    globals()[name]()
    try:
        yield
    finally:
        for kind, attributes in zip(kinds, before, strict=True):
            for key, value in dict(vars(kind)).items():
                if key not in attributes:
                    delattr(kind, key)
                elif value is not attributes[key]:
                    setattr(kind, key, attributes[key])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv = sys.argv[2:]
    runpy.run_path(
        str(Path(__file__).parents[2] / "scripts" / f"{sys.argv[0]}.py"), run_name="__main__"
    )
