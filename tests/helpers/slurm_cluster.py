"""A real SLURM on this machine, and what tests do with it. Needs slurm-wlm and munge;
scripts/test.sh installs them or says how.
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
    """Nodes n1, n2, ... of two cores and two pretended GPUs each, all of which see the same disk."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.logs, self.scratch = folder, folder / "logs", folder / "scratch"
        self.logs.mkdir(parents=True)
        self.scratch.mkdir()
        self._state = tempfile.mkdtemp()  # sockets in it have names of 108 characters at most
        self._call("up", nodes)

    def close(self) -> None:
        """End everything that runs in it."""
        self._call("down")
        shutil.rmtree(self._state, ignore_errors=True)

    def run(self, *command: object) -> str:
        """Run a client in the cluster and return what it printed."""
        return self._call("exec", *command)

    def admin(self, verb: str, node: str, *command: object) -> None:
        """killnode, startnode, unplug, plug, onnode; see minislurm.sh."""
        self._call(verb, node, *command)

    def set_down(self, node: str) -> None:
        """Let SLURM know now that a node does not answer. It would find out by itself, after
        minutes.
        """
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def sbatch(self, *arguments: object, site: str = "") -> str:
        """Submit one of slurm/*.sbatch from the repository's root, with the tests' site.env and
        some lines more, and return the job's id.
        """
        path = (
            self.folder / f"site-{time.monotonic_ns()}.env"
        )  # one a job: a requeued job reads it again
        path.write_text(
            f"""
            export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
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
        """What SLURM says of a job: JobState, Restarts, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: str, name: str = "pretrain") -> str:
        """What the batch script has printed so far, in all its attempts."""
        path = self.logs / f"{name}-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(
        self, job: str, states: set[str] = ENDED, seconds: float = MAX_SECONDS
    ) -> dict[str, str]:
        """Return the job when it is in one of some states."""
        self.wait_until(lambda: self.job(job)["JobState"] in states, seconds, job)
        return self.job(job)

    def wait_until(
        self,
        happened: Callable[[], bool],
        seconds: float = MAX_SECONDS,
        job: str = "",
        poll_seconds: float = 0.2,
    ) -> None:
        """Return when something has happened; fail with all logs when it does not in time."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"{self.job(job) if job else ''}\n{self.all_logs()}"
            time.sleep(poll_seconds)

    def all_logs(self) -> str:
        """The ends of all logs of all jobs."""
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
def cluster_of(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster that is gone afterwards."""
    cluster = Cluster(folder, nodes)
    try:
        yield cluster
    finally:
        cluster.close()
