"""Run kantai's programs as a user would."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
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


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME.py to its end."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run some lines of Python to their end."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("RANK", None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def launch_command(launcher: str | None, processes: int, *program: object) -> list[str]:
    """Python for a program; ``launcher`` names a file of configs/accelerate, None starts one plain process."""
    command = [sys.executable]
    if launcher is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launcher}.yaml"]
        command += ["--num_processes", str(processes)]
    return [*command, *map(str, program)]


def pretrain_command(launcher: str | None, *arguments: object, processes: int = 2) -> list[str]:
    """The command that trains a tiny model; see :func:`launch_command`."""
    return launch_command(launcher, processes, "scripts/pretrain.py", "--config", "configs/quickstart.yaml", *TINY, *arguments)


def pretrain(launcher: str | None, *arguments: object, processes: int = 2) -> str:
    """Run :func:`pretrain_command` to a good end and return what it printed."""
    command = pretrain_command(launcher, *arguments, processes=processes)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job(run: Path, *arguments: str, poisoned: Sequence[int] = (), source: Path | None = None, until: int = 0) -> dict[str, Any]:
    """A run for :func:`several`; see tests/helpers/multi_run.py."""
    return {"run_dir": str(run), "arguments": arguments, "poisoned": poisoned, "source": source and str(source), "until": until}


def several(launcher: str | None, processes: int, folder: Path, jobs: list[dict[str, Any]]) -> str:
    """Do runs in one launch, one after the other, and return what they printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = launch_command(launcher, processes, "tests/helpers/multi_run.py", folder / "jobs.json")
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_at_once(process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and its ranks, which are in sessions of their own."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """All tensors of a checkpoint by name, whatever files they are in."""
    folder = CheckpointStore(run_dir).path(step)
    verify(folder)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def metrics(run_dir: Path, name: str) -> list[float]:
    """One metric of a run, in the order of the steps, none missing or twice."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(record["step"], record[name]) for record in records if name in record]
    if name.startswith("train/"):
        assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]
