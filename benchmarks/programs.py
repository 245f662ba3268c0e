"""Run kantai's programs as a user does, each in a process of its own, and read what they log."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kantai.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
# The model of configs/tutorial.yaml: 83.5 million parameters.
TUTORIAL_MODEL = [
    "--model.vocab_size=52000",
    "--model.hidden_size=768",
    "--model.num_hidden_layers=6",
    "--model.num_attention_heads=12",
    "--model.intermediate_size=3072",
    "--model.max_position_embeddings=514",
]


def environment(ranks: int = 1) -> dict[str, str]:
    """Variables of a program: its share of the cores, one GPU, no network, no warnings."""
    cores = len(os.sched_getaffinity(0))
    return {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        **os.environ,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }


def launch_command(ranks: int, backend: str = "cpu") -> list[str]:
    """The command that starts a script on ``ranks`` ranks.

    Args:
        backend: a file of configs/accelerate. One rank of ``cpu`` needs Python alone.
    """
    if ranks == 1 and backend == "cpu":
        return [sys.executable]
    config = ["--config_file", f"configs/accelerate/{backend}.yaml", "--num_processes", str(ranks)]
    return [sys.executable, "-m", "accelerate.commands.launch", *config]


def pretrain_command(
    run: Path, settings: Sequence[str], config: Path = QUICKSTART, launcher: Sequence[str] = ()
) -> list[str]:
    """The command that trains in the run directory ``run``; without a launcher on one rank."""
    script = ["scripts/pretrain.py", "--config", str(config.absolute())]
    return [*(launcher or launch_command(1)), *script, *settings, f"--run_dir={run}"]


def run_to_end(command: Sequence[str], ranks: int = 1) -> None:
    """Run a command to a good end; exit with its output if it fails."""
    env = environment(ranks)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}\n{done.stderr}")


def run_script(path: str, *arguments: object, ranks: int = 1) -> None:
    """Run a script of the repository to a good end."""
    run_to_end([*launch_command(ranks), path, *map(str, arguments)], ranks)


def prepare_data(
    folder: Path, corpus: Path | None = None, vocab_size: int = 8000, document: str = "paragraph"
) -> list[str]:
    """Make tokenizer and shards of a text with the user's programs.

    Args:
        corpus: a text; None: Python's documentation.
        document: the unit of the text that is a document.

    Returns:
        The settings of a run that trains on the shards.
    """
    folder = folder.absolute()
    tokenizer = folder / "tokenizer"
    shards = folder / "shards"
    if corpus is None:
        run_script("scripts/get_corpus.py", "--output", folder / "corpus", "--name", "python-docs")
        corpus = folder / "corpus" / "corpus.txt"
    text = ["--input", corpus.absolute()]
    size = ["--vocab_size", vocab_size]
    run_script("scripts/train_tokenizer.py", *text, "--output", tokenizer, *size)
    how = ["--tokenizer", tokenizer, "--document", document]
    run_script("scripts/tokenize_corpus.py", *text, *how, "--output", shards)
    return [f"--data.shards={shards}", f"--data.tokenizer={tokenizer}"]


def read_records(run: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run's metrics that have a value of ``name``, oldest first."""
    path = run / "metrics.jsonl"
    return [record for record in read_metrics(path) if name in record] if path.exists() else []


def read_values(run: Path, name: str) -> list[float]:
    """The values that a run logged of a metric, oldest first."""
    return [record[name] for record in read_records(run, name)]
