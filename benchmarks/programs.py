"""How benchmarks run kantai's programs: as a user does, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(ranks: int = 1) -> dict[str, str]:
    """Of every program that is run: its share of the cores, one GPU, no network, no warnings."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    fixed = {
        "CUDA_VISIBLE_DEVICES": gpu,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    return {**threads, **os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false"}


def launch(ranks: int, backend: str = "cpu") -> list[str]:
    """The command that starts a script of ``backend``, a file of configs/accelerate; on one rank of ``cpu``, Python alone."""
    if ranks == 1 and backend == "cpu":
        return [sys.executable]
    config = ["--config_file", f"configs/accelerate/{backend}.yaml", "--num_processes", str(ranks)]
    return [sys.executable, "-m", "accelerate.commands.launch", *config]


def program(path: str, *arguments: object, ranks: int = 1) -> None:
    """Run a program of the repository to a good end."""
    command = [*launch(ranks), path, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(ranks), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{path}: {done.stdout}\n{done.stderr}")


def prepare(
    folder: Path, corpus: Path | None = None, vocab_size: int = 8000, document: str = "paragraph"
) -> list[str]:
    """Tokenizer and shards of a text, else of Python's documentation, by the user's programs; the settings of a run on them."""
    folder = folder.absolute()
    if corpus is None:
        program("scripts/get_corpus.py", "--output", folder / "corpus", "--name", "python-docs")
        corpus = folder / "corpus" / "corpus.txt"
    program(
        "scripts/train_tokenizer.py",
        "--input",
        corpus.absolute(),
        "--output",
        folder / "tokenizer",
        "--vocab_size",
        vocab_size,
    )
    where = [
        "--input",
        corpus.absolute(),
        "--tokenizer",
        folder / "tokenizer",
        "--output",
        folder / "shards",
    ]
    program("scripts/tokenize_corpus.py", *where, "--document", document)
    return [f"--data.shards={folder / 'shards'}", f"--data.tokenizer={folder / 'tokenizer'}"]
