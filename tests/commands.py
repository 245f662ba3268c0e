"""Run kantai's programs as a user would."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
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
    "--optimizer.warmup_updates=1",
    "--evaluation.max_sequences=20",
]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME.py to its end."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def pretrain_command(launcher: str | None, *arguments: object, processes: int = 2) -> list[str]:
    """The command that trains a tiny model; ``launcher`` names a file of configs/accelerate, None starts one plain process."""
    program = [sys.executable]
    if launcher is not None:
        program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launcher}.yaml"]
        program += ["--num_processes", str(processes)]
    return [*program, "scripts/pretrain.py", "--config", "configs/quickstart.yaml", *TINY, *map(str, arguments)]


def pretrain(launcher: str | None, *arguments: object, processes: int = 2) -> str:
    """Run :func:`pretrain_command` to a good end and return what it printed."""
    command = pretrain_command(launcher, *arguments, processes=processes)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_at_once(process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and its ranks, which are in sessions of their own."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def metrics(run_dir: Path, name: str) -> list[float]:
    """One metric of a run, in the order of the updates, none missing or twice."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(record["update"], record[name]) for record in records if name in record]
    if name.startswith("train/"):
        assert [update for update, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]
