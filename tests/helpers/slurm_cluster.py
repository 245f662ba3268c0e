"""A real SLURM on this machine for tests.

It needs slurm-wlm and munge; scripts/test.sh installs them or tells how.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.commands import MAX_SECONDS, ROOT, end_of

SCRIPT = ROOT / "tests" / "helpers" / "minislurm.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Cluster:
    """Nodes n1, n2, ... with two cores and two simulated GPUs each, and a shared disk."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.scratch = folder / "scratch"
        self.logs.mkdir(parents=True)
        self.scratch.mkdir()
        self._state = tempfile.mkdtemp()  # short: a socket's path has at most 108 characters
        self._call("up", nodes)

    def close(self) -> None:
        """End all processes of the cluster."""
        self._call("down")
        shutil.rmtree(self._state, ignore_errors=True)

    def run(self, *command: object) -> str:
        """Run a client such as squeue in the cluster and return its output."""
        return self._call("exec", *command)

    def admin(self, verb: str, node: str, *command: object) -> None:
        """Call killnode, startnode, unplug, plug or onnode of minislurm.sh."""
        self._call(verb, node, *command)

    def set_down(self, node: str) -> None:
        """Tell SLURM that a node does not answer; SLURM itself would notice after minutes."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def sbatch(self, *arguments: object, site: str = "") -> str:
        """Submit one of slurm/*.sbatch from the repository's root and return the job's id.

        Args:
            arguments: options, template and arguments for sbatch.
            site: lines to add to the tests' site.env.
        """
        # Each job has its own file, because a requeued job reads it again.
        path = self.folder / f"site-{time.monotonic_ns()}.env"
        path.write_text(
            f"""
            export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}
            export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
            LOGS={self.logs} LOCAL_SCRATCH={self.scratch} MAX_FRUITLESS=2 PREFLIGHT=no
            CONTAINER=() SRUN_OPTIONS=()
            : $CONDA_BACKUP_CC  # scripts in activate.d read what is not set
            {site}
            """
        )
        output = f"--output={self.logs}/%x-%j.out"
        printed = self.run("env", f"KANTAI_SITE={path}", "sbatch", "--parsable", output, *arguments)
        return printed.split(";")[0].strip()

    def job(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job: JobState, Restarts, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: str, name: str = "pretrain") -> str:
        """Return the batch script's output so far, of all attempts."""
        path = self.logs / f"{name}-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(
        self, job: str, states: set[str] = ENDED, seconds: float = MAX_SECONDS
    ) -> dict[str, str]:
        """Wait until the job is in one of ``states`` and return its record."""
        self.wait_until(lambda: self.job(job)["JobState"] in states, seconds, job)
        return self.job(job)

    def wait_until(
        self,
        condition: Callable[[], bool],
        seconds: float = MAX_SECONDS,
        job: str = "",
        poll_seconds: float = 0.2,
    ) -> None:
        """Wait until the condition holds; fail with all logs after ``seconds``."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.job(job) if job else ''}\n{self.all_logs()}"
            time.sleep(poll_seconds)

    def all_logs(self) -> str:
        """Return the end of each log of each job."""
        return "\n".join(
            f"=== {path}\n{end_of(path.read_text())}"
            for path in sorted(self.logs.rglob("*.[lo][ou][gt]"))
        )

    def _call(self, verb: str, *arguments: object) -> str:
        command = ["bash", str(SCRIPT), verb, self._state, *map(str, arguments)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_"))
        }
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def running_cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    """Yield a cluster; end it afterwards."""
    cluster = Cluster(folder, nodes)
    try:
        yield cluster
    finally:
        cluster.close()
