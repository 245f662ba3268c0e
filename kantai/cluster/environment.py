"""Where a process runs: its rank and world as the launcher announced them, and since when its node is allocated."""

import os
import time
from dataclasses import dataclass

from kantai.errors import UserError

_STARTED = time.time()


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks of a run, as the launcher announced it in the environment."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "RankInfo":
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


def allocated_since() -> float:
    """When this process's node was allocated to it, in Unix time: the start of its SLURM job, or its own."""
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(start) if start.isdigit() else _STARTED
