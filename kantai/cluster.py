"""Where am I? Rank and world as the launcher announced them, and whether somebody asked us to stop."""

import os
import signal
from dataclasses import dataclass
from types import FrameType

from kantai import UserError


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a run, as the launcher announced it in the environment."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Place":
        """Read what ``accelerate launch`` or ``torchrun`` set; without a launcher, a world of one.

        Raises:
            UserError: the launcher meant several processes and started one, as ``accelerate launch --cpu
                --num_processes 2`` does (it then announces a master address, but no rank).
        """
        env = os.environ
        if "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env and "RANK" not in env:
            raise UserError(
                "accelerate was asked for several processes but started one; "
                "launch with --config_file configs/accelerate/cpu.yaml, which really makes a world of two on CPU"
            )
        return cls(int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone creates files that belong to all."""
        return self.rank == 0


class StopSignal:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 came, for the loop to read at the next update boundary."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
