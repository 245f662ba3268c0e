"""Ranks exchange no pickles, and what they listen on is no more than the documentation says."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import TINY, Program, job, pretrain_command, run_jobs, wait_until

pytestmark = pytest.mark.slow

LOOPBACK = ("127.0.0.1", "::1")
NAN_CALLS = [3, 4, 5]


@pytest.mark.parametrize("launcher", ["cpu", "zero3"])
def test_ranks_exchange_no_pickles(
    launcher: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Not in a run that saves, rolls back and stops on request, nor in a comparison of all."""
    arguments = [
        "--config=configs/quickstart.yaml",
        *TINY,
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
    ]
    settings = [
        "--training.max_steps=6",
        "--checkpoint.every_steps=2",
        "--failures.compare_replicas_every=1",
    ]
    run = tmp_path / "run"
    jobs = [
        job(run, *arguments, *settings, fault="pickles_refused", nan_calls=NAN_CALLS),
        job(run, *arguments, *settings, "--training.max_steps=6"),
    ]
    printed = run_jobs(launcher, 2, tmp_path, jobs)
    assert "back to step 2" in printed[0]
    assert "6 of 6 steps done" in printed[1]


def listening(program: Program) -> set[tuple[str, int]]:
    processes = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("launcher", ["cpu", "zero2"])
def test_only_store_listens_beyond_this_machine(
    launcher: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """On one node gloo listens on loopback. PyTorch's store listens everywhere."""
    program = Program(
        pretrain_command(
            launcher,
            f"--data.shards={shards_dir}",
            f"--data.tokenizer={tokenizer_dir}",
            f"--run_dir={tmp_path / 'run'}",
            "--training.max_steps=100000",
        )
    )
    wait_until(lambda: "steps, 0 done" in program.out, program)
    found = listening(program)
    program.send_signal(signal.SIGTERM)
    program.wait_for_end()
    assert len({port for address, port in found if address in LOOPBACK}) >= 2, found
    assert len({port for address, port in found if address not in LOOPBACK}) == 1, found
