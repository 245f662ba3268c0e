"""How do batches come to a rank while it computes? Made ahead by a data loader's workers."""

import signal
import time
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, Dataset

from kantai import UserError
from kantai.batches import Batches
from kantai.cluster import STOP_SIGNALS
from kantai.model import MicroBatch

_PREFETCHED = 4  # micro-batches that a worker makes ahead


def stream(
    batches: Batches,
    rank: int,
    first_update: int,
    total_updates: int,
    workers: int,
    *,
    at: Callable[[int], int] = lambda update: update,
    pin_memory: bool = False,
) -> Iterator[tuple[int, list[MicroBatch], float]]:
    """Yield (update, this rank's micro-batches, seconds waited for them) from ``first_update`` on, made by any number of workers.

    Args:
        at: which update's data an update is shown; another one's after a run has passed over some.
    """

    def micro_steps(update: int) -> range:
        return range(batches.stage(at(update)).plan.gradient_accumulation_steps)

    sampler = ((at(update), micro_step) for update in range(first_update, total_updates) for micro_step in micro_steps(update))
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
    for update in range(first_update, total_updates):
        start = time.perf_counter()
        found = []
        for _ in micro_steps(update):
            made = next(micro_batches)
            if isinstance(made, UserError):
                raise made
            found.append(made)
        yield update, found, time.perf_counter() - start


class _MicroBatches(Dataset[MicroBatch | UserError]):
    """A rank's micro-batches by update and micro-step, so that a data loader's workers can make any of them.

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
