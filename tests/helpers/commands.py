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
# Not what a launcher or a job around the tests says of itself: programs would take it for theirs.
_OF_A_JOB = re.compile("(SLURM|SBATCH)_.*|(LOCAL_)?RANK|WORLD_SIZE|MASTER_(ADDR|PORT)")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not _OF_A_JOB.fullmatch(name)},
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
BETWEEN = "=== the next run ===\n"  # what two of several runs print
MAX_SECONDS = (
    900.0  # a guard against what hangs: nothing takes so long, however busy the machine is
)
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


started: list[
    "Program"
] = []  # by the test that runs; when it fails, tests/conftest.py shows how they ended
outputs = Path(tempfile.gettempdir())  # a folder of the session's own, see tests/conftest.py


class Program(subprocess.Popen[bytes]):
    """A program that was started, and what it has said so far.

    It says it to files: a pipe that nobody reads would stop it, and one that a lost rank holds open
    would stop us.
    """

    def __init__(self, command: Sequence[object], *, cwd: Path = ROOT, **environment: str) -> None:
        self._paths = [outputs / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        with self._paths[0].open("wb") as printed, self._paths[1].open("wb") as errors:
            super().__init__(
                [*map(str, command)],
                cwd=cwd,
                env={**ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
            )
        started.append(self)

    @property
    def out(self) -> str:
        """Standard output."""
        return self._paths[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        """Standard error."""
        return self._paths[1].read_text(errors="replace")

    def ended(self) -> int:
        """Wait for the end and return the exit code. What hangs is told to say where, ended, and a
        failure.
        """
        try:
            return self.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_all(signal.SIGABRT)  # faulthandler prints where each of them is
            time.sleep(5)
            self.kill_all()
        raise AssertionError(f"not ended after {MAX_SECONDS} seconds:\n{self.report()}")

    def kill_all(self) -> None:
        """SIGKILL to a launcher and its ranks, which are in sessions of their own."""
        self._kill_all(signal.SIGKILL)
        self.wait()

    def report(self) -> str:
        """The command, how it ended, and the last of what it said."""
        ends = f"--- printed\n{end_of(self.out)}\n--- errors\n{end_of(self.err)}"
        return f"{shlex.join(map(str, self.args))}\nexit code {self.poll()}\n{ends}"  # type: ignore[arg-type]

    def _kill_all(self, number: signal.Signals) -> None:
        if self.poll() is not None:  # and its number may be another's by now
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [*psutil.Process(self.pid).children(recursive=True), self]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)


def end_of(text: str, characters: int = 4000) -> str:
    """The last lines of a text."""
    return text if len(text) <= characters else f"[...]{text[-characters:]}"


def run_program(
    command: Sequence[object], *, code: int | None = None, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which must be the exit code ``code`` if that is given."""
    program = Program(command, cwd=cwd, **environment)
    found = program.ended()
    assert code is None or found == code, program.report()
    return subprocess.CompletedProcess(program.args, found, program.out, program.err)


def wait_until(
    happened: Callable[[], object], *programs: Program, poll_seconds: float = 0.01
) -> None:
    """Return when something has happened; fail when one of the programs that are to bring it about
    ends without it.
    """
    end = time.monotonic() + MAX_SECONDS
    while not happened():
        ended = [program for program in programs if program.poll() is not None]
        assert not ended or happened(), f"it did not come to that:\n{ended[0].report()}"
        assert time.monotonic() < end, f"it did not come to that in {MAX_SECONDS} seconds"
        time.sleep(poll_seconds)


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME.py to its end."""
    return run_program([sys.executable, ROOT / "scripts" / f"{name}.py", *arguments])


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some lines of Python to their end."""
    return run_program([sys.executable, "-c", code], cwd=cwd, PYTHONPATH=str(ROOT), **environment)


def launch_command(launcher: str | None, processes: int, *program: object) -> list[str]:
    """Python for a program; ``launcher`` names a file of configs/accelerate, None starts one plain
    process.
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
    """The command that trains a tiny model; see :func:`launch_command`."""
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
    """Run :func:`pretrain_command` to a good end and return what it printed."""
    return run_program(pretrain_command(launcher, *arguments, processes=processes), code=0).stdout


def job(
    run: Path,
    *arguments: str,
    program: str = "pretrain",
    poisoned: Sequence[int] = (),
    fault: str | None = None,
    source: Path | None = None,
    until: int = 0,
    damaged: int = 0,
    code: int = 0,
) -> dict[str, Any]:
    """A run for :func:`several`; see tests/helpers/multi_run.py.

    Args:
        fault: one of tests/helpers/faults.py.
        source: a run directory; this run goes on from what it was after ``until`` steps.
        damaged: the step of a checkpoint of it that has another bit here.
        code: the exit code with which it must end.
    """
    return {
        "program": program,
        "run_dir": str(run),
        "arguments": [*arguments, f"--run_dir={run}"],
        "poisoned": poisoned,
        "fault": fault,
        "source": source and str(source),
        "until": until,
        "damaged": damaged,
        "code": code,
    }


def several(
    launcher: str | None, processes: int, folder: Path, jobs: list[dict[str, Any]]
) -> list[str]:
    """Do runs in one launch, one after the other, and return what each printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = launch_command(
        launcher, processes, "-m", "tests.helpers.multi_run", folder / "jobs.json"
    )
    return run_program(command, code=0).stdout.split(BETWEEN)
