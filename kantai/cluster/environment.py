"""The launcher's and SLURM's environment: rank and world size, and the start of the job."""

import os
import time
from dataclasses import dataclass

from kantai.errors import UserError

_STARTED = time.time()


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks of a run, as the launcher announced it."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "RankInfo":
        """Read the variables of ``accelerate launch`` or ``torchrun``; without them, one rank.

        Raises:
            UserError: the launcher was asked for several processes and started one. ``accelerate
                launch --cpu --num_processes 2`` does so; it announces a master address, but no
                rank.
        """
        env = os.environ
        is_accelerate = "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env
        if is_accelerate and "RANK" not in env:
            raise UserError(
                "accelerate was asked for several processes but started one; "
                "launch with --config_file configs/accelerate/cpu.yaml, "
                "which really makes a world of two on CPU"
            )
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone creates files that belong to all ranks."""
        return self.rank == 0


def allocated_since() -> float:
    """Unix time at which this process got its node: the start of its SLURM job, or its own."""
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(start) if start.isdigit() else _STARTED
