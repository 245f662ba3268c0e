"""Measure speed and memory on the way from text to masked batches.

python benchmarks/data.py --work /tmp/bench    Python's documentation, repeated; some minutes
python benchmarks/data.py --work /tmp/bench --corpus kant.txt --megabytes 10 100 1000

All ways that are compared are measured in this run. The work folder is kept: another run finds the
texts and the tokenizer there.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from programs import ROOT
from timing import seconds_of

from kantai.config.loading import load_config
from kantai.data.batches import Batches
from kantai.data.dataset import open_data
from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import run_command
from kantai.preprocessing.starter_corpus import write_starter
from kantai.preprocessing.tokenizer_training import train_tokenizer
from kantai.storage.atomic import staged

CONFIG = ROOT / "configs" / "roberta-base.yaml"
CORES = len(os.sched_getaffinity(0))
ROUNDS = 3
MICRO_STEPS = 20  # of a round, when the loader is timed
OPENINGS = 20
SEQ_LEN = 512


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
        help="sizes of text at which memory is measured (default 10 50 250)",
    )
    parser.add_argument(
        "--compare_megabytes",
        type=int,
        default=50,
        help="size of text at which throughputs are compared (default 50)",
    )
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    source = prepare(work, arguments.corpus)
    entries = load_tokenizer(work / "tokenizer").size
    print(f"{CORES} cores; text: {source.name} repeated; tokenizer of {entries:,} entries\n")
    figures = {
        "cores": CORES,
        "corpus": source.name,
        **compare_tokenizing(work, repeated_text(work, source, arguments.compare_megabytes)),
        **measure_memory(work, [repeated_text(work, source, n) for n in arguments.megabytes]),
        **measure_loading(work, work / f"shards-{max(arguments.megabytes)}"),
    }
    (work / "data.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def prepare(work: Path, corpus: Path | None) -> Path:
    """Make the corpus, unless one is given, and the tokenizer. Returns the text."""
    work.mkdir(parents=True, exist_ok=True)
    if corpus is None and not (work / "corpus").exists():
        with staged(work / "corpus", kind="corpus") as folder:
            write_starter(folder, "python-docs")
    source = corpus or work / "corpus" / "corpus.txt"
    if not (work / "tokenizer").exists():
        with staged(work / "tokenizer", kind="tokenizer") as folder:
            save_tokenizer(train_tokenizer(paragraphs(source), 52_000, 2), folder)
    return source


def compare_tokenizing(work: Path, text: Path) -> dict[str, float]:
    """Print the throughput of three ways to tokenize a text with all cores.

    A throughput is the median of interleaved rounds.
    """
    output = work / "compared"
    tokenizer = work / "tokenizer"
    ways: dict[str, Callable[[], float]] = {
        "kantai: the program, text to verified shards": partial(
            program_seconds, text, tokenizer, output
        ),
        "tokenizers: encode_batch alone, in memory": partial(library_seconds, text, tokenizer),
        "datasets.map, twice, as in the example scripts": partial(
            datasets_seconds, text, tokenizer
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
    rates = {
        f"megabytes_per_second/{name}": size / median(found) for name, found in seconds.items()
    }
    return {**rates, "bytes_per_token": per_token}


def measure_memory(work: Path, texts: list[Path]) -> dict[str, float]:
    """Print the peak memory of all processes that tokenize, at several sizes of input."""
    figures = {}
    print("| text | seconds | peak memory of all processes |\n|---|---|---|")
    for text in texts:
        output = work / f"shards-{text.stem}"
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        megabytes = peak_bytes(tokenize_command(text, work / "tokenizer", output)) / 1e6
        seconds = time.perf_counter() - start
        size = text.stat().st_size / 1e6
        print(f"| {size:,.0f} MB | {seconds:.0f} | {megabytes:,.0f} MB |", flush=True)
        figures[f"peak_megabytes/{text.stem}"] = megabytes
    print()
    return figures


def measure_loading(work: Path, shards: Path) -> dict[str, float]:
    """Print masked tokens a second on one core, and the time to the first batch of a step."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = work / "tokenizer"
    settings = [f"--data.shards={shards}", f"--data.tokenizer={tokenizer}"]
    settings.append("--data.verify_hashes=false")
    figures: dict[str, float] = {}
    print(f"| loader, one core, {SEQ_LEN} tokens a sequence | million tokens/s |\n|---|---|")
    for packing, unit in (
        ("contiguous", "token"),
        ("contiguous", "word"),
        ("contiguous", "span"),
        ("isolated", "token"),
    ):
        of_way = [*settings, f"--data.packing={packing}", f"--masking.unit={unit}"]
        batches = open_batches(of_way)
        rates = [tokens_per_second(batches, step) for step in range(ROUNDS + 1)]
        rate = median(rates[1:])
        figures[f"tokens_per_second/{packing}/{unit}"] = rate
        print(f"| {packing}, {unit} masks | {rate / 1e6:.1f} |")

    print("\n| opening the data and making the first batch of step | ms | of step 0 |")
    print("|---|---|---|")
    times: dict[int, list[float]] = {0: [], 10**3: [], 10**6: []}
    for _ in range(OPENINGS):
        for step, found in times.items():
            found.append(seconds_of(partial(first_batch, settings, step)))
    for step, found in times.items():
        seconds = median(found)
        figures[f"seek_seconds/{step}"] = seconds
        print(f"| {step:,} | {seconds * 1e3:.1f} | {seconds / median(times[0]):.3f}x |")
    return figures


def open_batches(settings: list[str]) -> Batches:
    """The training batches of roberta-base on one rank."""
    return open_data(load_config(CONFIG, settings)).training_batches(1)


def tokens_per_second(batches: Batches, step: int) -> float:
    """Tokens a second in the first micro-steps of a step."""
    start = time.perf_counter()
    made = (batches.micro_batch(step, micro_step, 0) for micro_step in range(MICRO_STEPS))
    tokens = sum(batch.tokens for batch in made)
    return tokens / (time.perf_counter() - start)


def first_batch(settings: list[str], step: int) -> None:
    """Open the data and make the first batch of a step."""
    open_batches(settings).micro_batch(step, 0, 0)


def program_seconds(text: Path, tokenizer: Path, output: Path) -> float:
    """Seconds of the whole program, from its start to verified shards."""
    shutil.rmtree(output, ignore_errors=True)
    command = tokenize_command(text, tokenizer, output)
    run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    return seconds_of(run)


def library_seconds(text: Path, tokenizer: Path) -> float:
    """Seconds of the library alone: it encodes documents in memory and keeps no ids."""
    encode = load_tokenizer(tokenizer).tokenizer.encode_batch_fast
    documents = paragraphs(text)
    start = time.perf_counter()
    for first in range(0, len(documents), 1000):
        encode(documents[first : first + 1000], add_special_tokens=False)
    return time.perf_counter() - start


def datasets_seconds(text: Path, tokenizer: Path) -> float:
    """Seconds of transformers' example scripts, with a process a core.

    One ``map`` tokenizes, another cuts sequences.
    """
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return encode(rows["text"], return_special_tokens_mask=True)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(itertools.chain(*values)) for key, values in rows.items()}
        starts = range(0, len(joined["input_ids"]) // SEQ_LEN * SEQ_LEN, SEQ_LEN)
        return {
            key: [values[start : start + SEQ_LEN] for start in starts]
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


def peak_bytes(command: list[str]) -> int:
    """Most memory that a program and its children held at once.

    Memory that several share counts once (PSS).
    """
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        program = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # a child has ended meanwhile
                members = (program, *program.children(recursive=True))
                peak = max(peak, sum(member.memory_full_info().pss for member in members))
            time.sleep(0.1)
    assert process.returncode == 0
    return peak


def tokenize_command(text: Path, tokenizer: Path, output: Path) -> list[str]:
    """The user's command."""
    program = [sys.executable, str(ROOT / "scripts/tokenize_corpus.py"), "--document", "paragraph"]
    where = ["--input", str(text), "--tokenizer", str(tokenizer), "--output", str(output)]
    return [*program, *where]


def repeated_text(work: Path, source: Path, megabytes: int) -> Path:
    """A text of that size: the source's paragraphs repeated, each time in another order."""
    path = work / f"{megabytes}.txt"
    if not path.exists():
        parts = [part for part in paragraphs(source) if part.strip()]
        random_numbers = random.Random(0)
        size = 0
        partial_path = path.with_suffix(".partial")
        with partial_path.open("w", encoding="utf-8") as file:
            while size < megabytes * 10**6:
                random_numbers.shuffle(parts)
                size += file.write("\n\n".join(parts) + "\n\n")
        partial_path.rename(path)
    return path


def paragraphs(text: Path) -> list[str]:
    """The paragraphs of a text."""
    return text.read_text(encoding="utf-8").split("\n\n")


if __name__ == "__main__":
    run_command(main)
