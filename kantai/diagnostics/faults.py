"""Faults to inject into the running process, for chaos and for tests.

Each is a context manager that patches a class. The code that it breaks knows nothing of it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kantai.data.batches import Batch, Batches
from kantai.data.loader import MicroBatch
from kantai.distributed.engine import Engine, StepResult


@contextmanager
def loss_multiplied(
    factor: float, is_due: Callable[[int, Sequence[MicroBatch]], bool]
) -> Iterator[None]:
    """Multiply this rank's loss by a factor in some steps.

    Args:
        is_due: takes a step and this rank's micro-batches, and says whether the fault strikes.
            It is called once a step.
    """
    real = Engine.train_step

    def train_step(
        self: Engine, step: int, micro_batches: Sequence[MicroBatch], *rest: Any, **named: Any
    ) -> StepResult:
        if not is_due(step, micro_batches):
            return real(self, step, micro_batches, *rest, **named)
        hook = self.raw_model.register_forward_hook(
            lambda _module, _inputs, outputs: (outputs[0] * factor, *outputs[1:])
        )
        try:
            return real(self, step, micro_batches, *rest, **named)
        finally:
            hook.remove()

    with patch.object(Engine, "train_step", train_step):
        yield


@contextmanager
def nan_loss_on_data(data_steps: Collection[int], rank: int) -> Iterator[None]:
    """Make one rank's loss NaN whenever it is shown the data of some steps.

    After a run has skipped data, it shows a step the data of a later one. So batches are marked
    where they are made: Batches.micro_batch is told the step that the data belongs to.
    """
    real = Batches.micro_batch

    def micro_batch(self: Batches, step: int, micro_step: int, for_rank: int) -> Batch:
        batch = real(self, step, micro_step, for_rank)
        is_bad = step in data_steps and for_rank == rank
        return _BadBatch(**vars(batch)) if is_bad else batch

    def shows_bad_data(_step: int, micro_batches: Sequence[MicroBatch]) -> bool:
        return any(isinstance(each.batch, _BadBatch) for each in micro_batches)

    with (
        patch.object(Batches, "micro_batch", micro_batch),
        loss_multiplied(float("nan"), shows_bad_data),
    ):
        yield


class _BadBatch(Batch):
    """A batch whose loss is to be NaN. The mark survives the way from a loader's worker."""
