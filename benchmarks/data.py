"""How fast and how large is the way from text to masked batches? One table, every ratio measured in this run.

python benchmarks/data.py --work /tmp/bench                     Python's documentation, repeated; some minutes
python benchmarks/data.py --work /tmp/bench --corpus kant.txt --megabytes 10 100 1000

The work folder is kept, so that another run finds texts and shards made.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import run_command
from kantai.preprocessing.starter_corpus import write_starter
from kantai.preprocessing.tokenizer_training import train_tokenizer
from kantai.storage.atomic import staged

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for texts and shards")
    parser.add_argument(
        "--corpus",
        type=Path,
        help="a text of paragraphs to repeat (default: Python's documentation)",
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        nargs="+",
        default=[10, 50, 250],
        help="sizes of text (default 10 50 250)",
    )
    parser.add_argument(
        "--compare_megabytes",
        type=int,
        default=50,
        help="size at which throughputs are compared (default 50)",
    )
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.corpus is None and not (work / "corpus").exists():
        with staged(work / "corpus", kind="corpus") as folder:
            write_starter(folder, "python-docs")
    source: Path = arguments.corpus or work / "corpus" / "corpus.txt"
    if not (work / "tokenizer").exists():
        with staged(work / "tokenizer", kind="tokenizer") as folder:
            save_tokenizer(
                train_tokenizer(source.read_text(encoding="utf-8").split("\n\n"), 52_000, 2), folder
            )
    figures: dict[str, Any] = {"cores": CORES, "corpus": source.name}
    print(
        f"{CORES} cores; text: {source.name} repeated; tokenizer of {load_tokenizer(work / 'tokenizer').size:,} entries\n"
    )
    figures |= tokenizing(work, text_of(work, source, arguments.compare_megabytes))
    figures |= memory(work, [text_of(work, source, size) for size in arguments.megabytes])
    figures |= loading(work, work / f"shards-{max(arguments.megabytes)}")
    (work / "data.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def tokenizing(work: Path, text: Path) -> dict[str, float]:
    """Throughput of three ways to tokenize one text with all cores: the median of interleaved rounds."""
    output = work / "compared"
    ways: dict[str, Callable[[], float]] = {
        "kantai: the program, text to verified shards": lambda: kantai(
            text, work / "tokenizer", output
        ),
        "tokenizers: encode_batch alone, in memory": lambda: raw(text, work / "tokenizer"),
        "datasets.map, twice, as in the example scripts": lambda: with_datasets(
            text, work / "tokenizer"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(way())
    ours = median(next(iter(seconds.values())))
    size = text.stat().st_size / 1e6
    print(f"| tokenizing {size:,.0f} MB | MB/s | kantai is |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {size / median(found):.1f} | {median(found) / ours:.2f}x |")
    manifest = json.loads((output / "manifest.json").read_text())
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    per_token = sum(path.stat().st_size for path in output.iterdir()) / tokens
    print(f"\n{per_token:.3f} bytes a token on disk\n")
    return {
        f"megabytes_per_second/{name}": size / median(found) for name, found in seconds.items()
    } | {"bytes_per_token": per_token}


def memory(work: Path, texts: list[Path]) -> dict[str, float]:
    """Peak memory of all processes that tokenize, at several sizes of input."""
    figures = {}
    print("| text | seconds | peak memory of all processes |\n|---|---|---|")
    for text in texts:
        output = work / f"shards-{text.stem}"
        subprocess.run(["rm", "-rf", output], check=True)
        start = time.perf_counter()
        peak = peak_bytes(command(text, work / "tokenizer", output))
        print(
            f"| {text.stat().st_size / 1e6:,.0f} MB | {time.perf_counter() - start:.0f} | {peak / 1e6:,.0f} MB |",
            flush=True,
        )
        figures[f"peak_megabytes/{text.stem}"] = peak / 1e6
    print()
    return figures


def loading(work: Path, shards: Path) -> dict[str, float]:
    """Masked tokens a second on one core, and the time to the first batch at three places of a run."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = [
        f"--data.shards={shards}",
        f"--data.tokenizer={work / 'tokenizer'}",
        "--data.verify_hashes=false",
    ]
    figures: dict[str, float] = {}
    print("| loader, one core, 512 tokens a sequence | million tokens/s |\n|---|---|")
    for packing, unit in (
        ("contiguous", "token"),
        ("contiguous", "word"),
        ("contiguous", "span"),
        ("isolated", "token"),
    ):
        data = open_data(
            load_config(
                ROOT / "configs/roberta-base.yaml",
                [*settings, f"--data.packing={packing}", f"--masking.unit={unit}"],
            )
        )
        batches, rates = data.training_batches(1), []
        for attempt in range(ROUNDS + 1):
            start = time.perf_counter()
            tokens = sum(batches.micro_batch(attempt, step, 0).tokens for step in range(20))
            rates.append(tokens / (time.perf_counter() - start))
        figures[f"tokens_per_second/{packing}/{unit}"] = median(rates[1:])
        print(f"| {packing}, {unit} masks | {median(rates[1:]) / 1e6:.1f} |")
    print(
        "\n| opening the data and making the first batch of step | ms | of step 0 |\n|---|---|---|"
    )
    times: dict[int, list[float]] = {0: [], 10**3: [], 10**6: []}
    for _ in range(20):
        for step, found in times.items():
            start = time.perf_counter()
            open_data(load_config(ROOT / "configs/roberta-base.yaml", settings)).training_batches(
                1
            ).micro_batch(step, 0, 0)
            found.append(time.perf_counter() - start)
    for step, found in times.items():
        figures[f"seek_seconds/{step}"] = median(found)
        print(f"| {step:,} | {median(found) * 1e3:.1f} | {median(found) / median(times[0]):.3f}x |")
    return figures


def kantai(text: Path, tokenizer: Path, output: Path) -> float:
    """Seconds of the whole program, from its start to verified shards."""
    subprocess.run(["rm", "-rf", output], check=True)
    start = time.perf_counter()
    subprocess.run(command(text, tokenizer, output), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def raw(text: Path, tokenizer: Path) -> float:
    """Seconds of the library alone: documents that are in memory already, encoded in batches on all cores, the ids thrown away."""
    encode, documents = (
        load_tokenizer(tokenizer).tokenizer.encode_batch_fast,
        text.read_text(encoding="utf-8").split("\n\n"),
    )
    start = time.perf_counter()
    for first in range(0, len(documents), 1000):
        encode(documents[first : first + 1000], add_special_tokens=False)
    return time.perf_counter() - start


def with_datasets(text: Path, tokenizer: Path) -> float:
    """Seconds of what transformers' example scripts do: ``map`` to tokenize, ``map`` again to cut sequences, a process a core."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return encode(rows["text"], return_special_tokens_mask=True)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(itertools.chain(*values)) for key, values in rows.items()}
        total = len(joined["input_ids"]) // 512 * 512
        return {
            key: [values[i : i + 512] for i in range(0, total, 512)]
            for key, values in joined.items()
        }

    with tempfile.TemporaryDirectory(dir=text.parent) as cache:
        start = time.perf_counter()
        rows = datasets.load_dataset(
            "text", data_files=str(text), split="train", cache_dir=cache, sample_by="paragraph"
        )
        rows = rows.map(tokenize, batched=True, num_proc=CORES, remove_columns=["text"])
        rows.map(group, batched=True, num_proc=CORES)
        return time.perf_counter() - start


def peak_bytes(arguments: list[str]) -> int:
    """Most memory that a program and its children held at once; pages shared by several count once (PSS)."""
    peak = 0
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        program = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(
                    peak,
                    sum(
                        member.memory_full_info().pss
                        for member in (program, *program.children(recursive=True))
                    ),
                )
            time.sleep(0.1)
    assert process.returncode == 0
    return peak


def command(text: Path, tokenizer: Path, output: Path) -> list[str]:
    """The user's command."""
    program = [sys.executable, str(ROOT / "scripts/tokenize_corpus.py"), "--document", "paragraph"]
    return [*program, "--input", str(text), "--tokenizer", str(tokenizer), "--output", str(output)]


def text_of(work: Path, source: Path, megabytes: int) -> Path:
    """A text of that size: the source's paragraphs again and again, each time in another order."""
    path = work / f"{megabytes}.txt"
    if not path.exists():
        paragraphs = [
            part for part in source.read_text(encoding="utf-8").split("\n\n") if part.strip()
        ]
        shuffle, size = random.Random(0), 0
        with path.with_suffix(".partial").open("w", encoding="utf-8") as file:
            while size < megabytes * 10**6:
                shuffle.shuffle(paragraphs)
                size += file.write("\n\n".join(paragraphs) + "\n\n")
        path.with_suffix(".partial").rename(path)
    return path


if __name__ == "__main__":
    run_command(main)
