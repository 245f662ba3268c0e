"""Tasks of srun or mpirun are one world, or are refused."""

import pytest

from kantai.cluster.environment import RankInfo
from kantai.errors import UserError

LAUNCHER = {"RANK": "1", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
NAMES = (
    *LAUNCHER,
    "GROUP_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)


def read(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> RankInfo:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return RankInfo.from_environment()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2"},  # srun -n2 python scripts/pretrain.py
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
        # srun -n2 accelerate launch --num_processes 8: two worlds of one machine
        {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1", **LAUNCHER},
        # eight tasks a node, each of which starts eight ranks
        {"SLURM_STEP_NUM_TASKS": "16", "GROUP_WORLD_SIZE": "2", **LAUNCHER},
        {"SLURM_STEP_NUM_TASKS": "8", **LAUNCHER},
    ],
)
def test_tasks_that_would_train_apart_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="they would train apart"):
        read(monkeypatch, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which is one process
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # one of several steps of a job
        {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2", **LAUNCHER},
        {"SLURM_STEP_NUM_TASKS": "16", **LAUNCHER},  # srun itself starts the ranks
        LAUNCHER,
    ],
)
def test_tasks_of_one_world_pass(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    assert read(monkeypatch, environment).world_size == int(environment.get("WORLD_SIZE", "1"))
