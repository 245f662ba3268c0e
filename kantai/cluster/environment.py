"""The launcher's and SLURM's environment: rank and world size, and the start of the job."""

import os
import time
from collections.abc import Mapping
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
                rank. Or srun or mpirun started several, and each would train a world of its own.
        """
        env = os.environ
        _refuse_worlds_apart(env)
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


# How many tasks srun and the MPI launchers say that they have started.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def _refuse_worlds_apart(env: Mapping[str, str]) -> None:
    """Refuse tasks of one command that do not make up one world.

    torchrun, which accelerate uses, says how many launchers share its world. Ranks that somebody
    started without it are as many as the tasks.
    """
    announced = [int(env[name]) for name in _TASKS if env.get(name, "").isdecimal()]
    tasks = max(announced, default=1)
    together = int(env.get("GROUP_WORLD_SIZE", env.get("WORLD_SIZE", "1")))
    if tasks > 1 and tasks != together:
        raise UserError(
            f"srun or mpirun started {tasks} tasks, and this one is in a world of {together}: they "
            "would train apart and supersede each other. Start one task a node, which runs "
            f"accelerate launch with --num_machines {tasks}, as slurm/pretrain.sbatch does; or "
            "one task alone, by srun --ntasks=1"
        )


def allocated_since() -> float:
    """Unix time at which this process got its node: the start of its SLURM job, or its own."""
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(start) if start.isdigit() else _STARTED
