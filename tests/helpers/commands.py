"""Run kantai's programs as a user would."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
# Programs would take the variables of a launcher or a job around the tests for their own.
_JOB_VARIABLE = re.compile("(SLURM|SBATCH)_.*|(LOCAL_)?RANK|WORLD_SIZE|MASTER_(ADDR|PORT)")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not _JOB_VARIABLE.fullmatch(name)},
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
RUN_SEPARATOR = "=== the next run ===\n"  # stands between the outputs of two runs
MAX_SECONDS = 900.0  # ends what hangs: no program takes so long, even on a busy machine
TINY = [
    "--data.seq_len=32",
    "--model.hidden_size=32",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
    "--batch.global_batch_size=10",
    "--batch.micro_batch_size=4",
    "--optimizer.warmup_steps=1",
    "--evaluation.max_sequences=20",
]


# Programs of the current test; tests/conftest.py reports them when it fails.
started_programs: list["Program"] = []
outputs_dir = Path(tempfile.gettempdir())  # tests/conftest.py sets a folder of the session


class Program(subprocess.Popen[bytes]):
    """A started program and its output so far.

    Output goes to files. An unread pipe would block the program, and a pipe that a lost rank holds
    open would block the test.
    """

    def __init__(self, command: Sequence[object], *, cwd: Path = ROOT, **environment: str) -> None:
        self._paths = [outputs_dir / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        with self._paths[0].open("wb") as printed, self._paths[1].open("wb") as errors:
            super().__init__(
                [*map(str, command)],
                cwd=cwd,
                env={**ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
            )
        started_programs.append(self)

    @property
    def out(self) -> str:
        """Standard output."""
        return self._paths[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        """Standard error."""
        return self._paths[1].read_text(errors="replace")

    def wait_for_end(self) -> int:
        """Wait for the end and return the exit code.

        A program that hangs prints its stacks, is killed, and fails the test.
        """
        try:
            return self.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_all(signal.SIGABRT)  # faulthandler prints the stacks
            time.sleep(5)
            self.kill_all()
        raise AssertionError(f"not ended after {MAX_SECONDS} seconds:\n{self.report()}")

    def kill_all(self) -> None:
        """Send SIGKILL to a launcher and its ranks, which have sessions of their own."""
        self._kill_all(signal.SIGKILL)
        self.wait()

    def report(self) -> str:
        """Return the command, its exit code and the end of its output."""
        command = shlex.join(map(str, self.args))  # type: ignore[arg-type]
        ends = f"--- printed\n{end_of(self.out)}\n--- errors\n{end_of(self.err)}"
        return f"{command}\nexit code {self.poll()}\n{ends}"

    def _kill_all(self, number: signal.Signals) -> None:
        if self.poll() is not None:  # another process may have its number now
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [*psutil.Process(self.pid).children(recursive=True), self]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)


def end_of(text: str, characters: int = 4000) -> str:
    """Return the last characters of a text."""
    return text if len(text) <= characters else f"[...]{text[-characters:]}"


def run_program(
    command: Sequence[object], *, code: int | None = None, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; fail unless its exit code is ``code``, where that is given."""
    program = Program(command, cwd=cwd, **environment)
    found = program.wait_for_end()
    assert code is None or found == code, program.report()
    return subprocess.CompletedProcess(program.args, found, program.out, program.err)


def wait_until(
    condition: Callable[[], object], *programs: Program, poll_seconds: float = 0.01
) -> None:
    """Wait until the condition holds; fail when one of the programs ends before it does."""
    end = time.monotonic() + MAX_SECONDS
    while not condition():
        ended = [program for program in programs if program.poll() is not None]
        assert not ended or condition(), f"a program ended too early:\n{ended[0].report()}"
        assert time.monotonic() < end, f"the condition did not hold within {MAX_SECONDS} seconds"
        time.sleep(poll_seconds)


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME.py to its end."""
    return run_program([sys.executable, ROOT / "scripts" / f"{name}.py", *arguments])


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some lines of Python to their end."""
    return run_program([sys.executable, "-c", code], cwd=cwd, PYTHONPATH=str(ROOT), **environment)


def launch_command(launcher: str | None, processes: int, *program: object) -> list[str]:
    """Return the command that starts a program.

    Args:
        launcher: the name of a file of configs/accelerate; None starts one plain process.
        processes: the number of ranks.
        program: the program and its arguments.
    """
    command = [sys.executable]
    if launcher is not None:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"configs/accelerate/{launcher}.yaml",
        ]
        command += ["--num_processes", str(processes)]
    return [*command, *map(str, program)]


def pretrain_command(launcher: str | None, *arguments: object, processes: int = 2) -> list[str]:
    """Return the command that trains a tiny model; see :func:`launch_command`."""
    return launch_command(
        launcher,
        processes,
        "scripts/pretrain.py",
        "--config",
        "configs/quickstart.yaml",
        *TINY,
        *arguments,
    )


def pretrain(launcher: str | None, *arguments: object, processes: int = 2) -> str:
    """Run :func:`pretrain_command`, which must exit with 0, and return its output."""
    return run_program(pretrain_command(launcher, *arguments, processes=processes), code=0).stdout


def job(
    run: Path,
    *arguments: str,
    program: str = "pretrain",
    nan_calls: Sequence[int] = (),
    fault: str | None = None,
    source: Path | None = None,
    until: int = 0,
    damaged: int = 0,
    code: int = 0,
) -> dict[str, Any]:
    """Return a run for :func:`run_jobs`; see tests/helpers/multi_run.py.

    Args:
        nan_calls: the calls of Engine.train_step where the last rank's loss is NaN.
        fault: a function of tests/helpers/faults.py.
        source: a run directory; the run resumes from its copy at step ``until``.
        damaged: the step of a checkpoint where the copy has a flipped bit.
        code: the expected exit code.
    """
    return {
        "program": program,
        "run_dir": str(run),
        "arguments": [*arguments, f"--run_dir={run}"],
        "nan_calls": nan_calls,
        "fault": fault,
        "source": source and str(source),
        "until": until,
        "damaged": damaged,
        "code": code,
    }


def run_jobs(
    launcher: str | None, processes: int, folder: Path, jobs: list[dict[str, Any]]
) -> list[str]:
    """Do runs in one launch, one after the other, and return the output of each."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = launch_command(
        launcher, processes, "-m", "tests.helpers.multi_run", folder / "jobs.json"
    )
    return run_program(command, code=0).stdout.split(RUN_SEPARATOR)
