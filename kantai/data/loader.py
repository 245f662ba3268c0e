"""The data loader: workers collate a rank's micro-batches ahead of the computation."""

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

_PREFETCHED = 4  # micro-batches that a worker makes ahead
_STEPS_AHEAD = 256  # steps whose shards are fetched before they are read


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its way from a loader to a device.

    A worker sends arrays. Tensors would go through shared memory with one file descriptor each,
    which is slower for so little data, and fails in containers that have little shared memory.
    """

    batch: Batch
    pinned: dict[str, Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of :meth:`MaskedRoberta.forward`."""
        if self.pinned:
            return self.pinned
        arrays = {
            "input_ids": self.batch.input_ids,
            "attention_mask": self.batch.attention_mask,
            "masked_positions": self.batch.masked_positions,
            "labels": self.batch.labels,
            "document_starts": self.batch.document_starts,
        }
        return {
            name: torch.from_numpy(array) for name, array in arrays.items() if array is not None
        }

    def pin_memory(self) -> "MicroBatch":
        """The micro-batch in page-locked memory; the loader calls this.

        Page-locked memory is copied to the device while the device computes.
        """
        pinned = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return MicroBatch(self.batch, pinned)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


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
    """Yield (step, this rank's micro-batches, seconds waited for them) from ``first_step`` on.

    Args:
        workers: loader processes; 0: this process makes the batches.
        at: maps a step to the step of its data, which is a later one if the run skipped data.
    """

    def micro_steps(step: int) -> range:
        return range(batches.stage_at(at(step)).plan.gradient_accumulation_steps)

    sampler = (
        (at(step), micro_step)
        for step in range(first_step, max_steps)
        for micro_step in micro_steps(step)
    )
    loader = DataLoader(
        _MicroBatches(batches, rank),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        # Forked workers share the mapped shards. Any other start would pickle whole shards.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=pin_memory,
    )
    micro_batches = iter(loader)
    for step in range(first_step, max_steps):
        start = time.perf_counter()
        of_step = []
        for _ in micro_steps(step):
            micro_batch = next(micro_batches)
            if isinstance(micro_batch, UserError):
                raise micro_batch
            of_step.append(micro_batch)
        yield step, of_step, time.perf_counter() - start


class _MicroBatches(Dataset[MicroBatch | UserError]):
    """A rank's micro-batches by step and micro-step, in any order and from any worker.

    A user's error is returned, not raised: a worker would add its traceback to the message.
    """

    def __init__(self, batches: Batches, rank: int) -> None:
        self.batches = batches
        self.rank = rank

    def __getitem__(self, place: tuple[int, int]) -> MicroBatch | UserError:
        step, micro_step = place
        try:
            return MicroBatch(self.batches.micro_batch(step, micro_step, self.rank))
        except UserError as error:
            return error


def _ignore_stop_signals(_worker: int) -> None:
    """Ignore the signals that launchers and SLURM send to every process.

    A worker that ended by one would take its rank along before the rank has saved.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Prefetcher:
    """Fetches shards at a URL to this node before a rank reads them."""

    def __init__(self, data: Data, batches: Batches, rank: int, first_step: int) -> None:
        self.shards = data.shards
        self.batches = batches
        self.rank = rank
        self.stop_step = data.max_steps
        self.next_step = first_step
        self.wanted: deque[list[int]] = deque(maxlen=_STEPS_AHEAD)  # shards of each step

    def advance(self, step: int) -> None:
        """Request the shards of the steps ahead of ``step`` that were not yet requested."""
        if self.shards.cache is None:
            return
        requested = set(itertools.chain(*self.wanted))
        while self.next_step < min(step + _STEPS_AHEAD, self.stop_step):
            self.wanted.append(self.batches.shards(self.next_step, self.rank))
            self.next_step += 1
        wanted = list(dict.fromkeys(itertools.chain(*self.wanted)))
        if not requested.issuperset(wanted):
            self.shards.prefetch("train", wanted)
