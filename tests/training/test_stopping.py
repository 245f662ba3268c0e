"""Tests that slurm/pretrain.sbatch understands the messages that a run ends with."""

import re
import subprocess
from pathlib import Path

import pytest

from kantai.training.stopping import stopped_message
from tests.helpers.commands import ROOT, run_python


def ask_batch_script(function: str, logs: Path, **variables: str) -> tuple[int, str]:
    """Run a function of the batch script; return its exit code and what it prints."""
    text = (ROOT / "slurm/pretrain.sbatch").read_text()
    (body,) = re.findall(rf"^{function}\(\) {{\n.*?^}}$", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", f"set -u\n{body}\n{function}"],
        env={"ATTEMPT_LOGS": str(logs), "out_of_time": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


def test_batch_script_sees_that_a_start_was_superseded(tmp_path: Path) -> None:
    code = f"""
import pathlib
from kantai.checkpoint.store import CheckpointStore
from kantai.errors import run_command
first, second = (CheckpointStore(pathlib.Path({str(tmp_path / "run")!r})) for _ in range(2))
first.supersede()
second.supersede()
run_command(lambda: first.begin(1))
"""
    log = tmp_path / "rank-00003.log"
    log.write_text("error: something else\n")
    assert ask_batch_script("superseded", tmp_path)[0] == 1
    log.write_text(run_python(code).stderr)
    assert ask_batch_script("superseded", tmp_path)[0] == 0, log.read_text()


@pytest.mark.parametrize(
    ("reason", "out_of_time", "seconds"),
    [
        ("the job ends in 31 s", "", "12"),
        ("SIGTERM came", "", "12"),  # a preemption
        ("SIGUSR1 came", "yes", "12"),
        ("SIGUSR1 came", "", ""),  # long before the limit: it is the user's
        ("SIGINT came", "yes", ""),
        ("SIGHUP came", "", ""),
        ("there is a file /runs/mine/STOP", "", ""),
        ("there is a file /runs/the job ends in 3 s/STOP", "yes", ""),
    ],
)
def test_batch_script_counts_seconds_of_starts_that_the_job_ended(
    reason: str, out_of_time: str, seconds: str, tmp_path: Path
) -> None:
    message = stopped_message(reason, 12.3, done=7, max_steps=100)
    (tmp_path / "rank-00000.log").write_text(f"model: tiny\n{message}\n")
    asked = ask_batch_script("seconds_trained", tmp_path, out_of_time=out_of_time)
    assert asked == (0, seconds)
