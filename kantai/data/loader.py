"""How do batches come to a rank while it computes? Made ahead by a data loader's workers."""

import itertools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kantai.cluster.signals import STOP_SIGNALS
from kantai.data.batches import Batch, Batches
from kantai.data.dataset import Data
from kantai.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its way from a loader to a device.

    A loader's worker sends arrays: tensors would go through shared memory, one file descriptor each, which is slower for so little and
    runs out where containers have little of it.
    """

    batch: Batch
    pinned: dict[str, Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of :meth:`MaskedRoberta.forward`."""
        names = ("input_ids", "attention_mask", "masked_positions", "labels", "document_starts")
        arrays = {name: getattr(self.batch, name) for name in names}
        return self.pinned or {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which it is copied while the device computes; called by the loader."""
        return MicroBatch(self.batch, {name: tensor.pin_memory() for name, tensor in self.inputs.items()})

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


_PREFETCHED = 4  # micro-batches that a worker makes ahead


def stream(
    batches: Batches,
    rank: int,
    first_step: int,
    max_steps: int,
    workers: int,
    *,
    at: Callable[[int], int] = lambda step: step,
    pin_memory: bool = False,
) -> Iterator[tuple[int, list[MicroBatch], float]]:
    """Yield (step, this rank's micro-batches, seconds waited for them) from ``first_step`` on, made by any number of workers.

    Args:
        at: which step's data a step is shown; another one's after a run has skipped some.
    """

    def micro_steps(step: int) -> range:
        return range(batches.stage_at(at(step)).plan.gradient_accumulation_steps)

    sampler = ((at(step), micro_step) for step in range(first_step, max_steps) for micro_step in micro_steps(step))
    loader = DataLoader(
        _MicroBatches(batches, rank),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        # Forked workers share the mapped shards; any other start would pickle them, whole.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=_leave_signals_to_the_rank,
        pin_memory=pin_memory,
    )
    micro_batches = iter(loader)
    for step in range(first_step, max_steps):
        start = time.perf_counter()
        found = []
        for _ in micro_steps(step):
            made = next(micro_batches)
            if isinstance(made, UserError):
                raise made
            found.append(made)
        yield step, found, time.perf_counter() - start


class _MicroBatches(Dataset[MicroBatch | UserError]):
    """A rank's micro-batches by step and micro-step, so that a data loader's workers can make any of them.

    What a user can put right is returned and not raised: a worker would make its traceback part of the message.
    """

    def __init__(self, batches: Batches, rank: int) -> None:
        self.batches, self.rank = batches, rank

    def __getitem__(self, place: tuple[int, int]) -> MicroBatch | UserError:
        try:
            return MicroBatch(self.batches.micro_batch(*place, self.rank))
        except UserError as error:
            return error


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Launchers and SLURM signal every process. A worker that ended by it would take its rank along, before that has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Prefetcher:
    """Has the shards that a rank will read from fetched to this node before it does, where they come from a URL."""

    def __init__(self, data: Data, batches: Batches, rank: int, first_step: int, *, steps_ahead: int = 256) -> None:
        self.shards, self.batches, self.rank, self.stop_step = data.shards, batches, rank, data.max_steps
        self.steps_ahead, self.looked_at = steps_ahead, first_step
        self.wanted: deque[list[int]] = deque(maxlen=steps_ahead)  # by step

    def advance(self, step: int) -> None:
        """Look as far ahead of a step as is allowed, and ask for what has not been asked for."""
        if self.shards.cache is None:
            return
        before = set(itertools.chain(*self.wanted))
        while self.looked_at < min(step + self.steps_ahead, self.stop_step):
            self.wanted.append(self.batches.shards(self.looked_at, self.rank))
            self.looked_at += 1
        wanted = list(dict.fromkeys(itertools.chain(*self.wanted)))
        if not before.issuperset(wanted):
            self.shards.prefetch("train", wanted)
