"""Compute what a corpus of any size would cost: the first section of docs/scale.md.

python benchmarks/scale.py --tokens 1e12

The real code plans, opens and shuffles a made-up manifest. No file is read.
"""

import argparse
import hashlib
import itertools
import json
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import numpy as np
from timing import seconds_of

from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Batches, Stage
from kantai.data.packing import Contiguous
from kantai.data.shards import (
    SHARD_TOKENS,
    TOKEN_COUNTS,
    ShardSet,
    Split,
    open_shards,
    token_dtype,
)
from kantai.data.shuffle import Shuffled
from kantai.preprocessing.files import File
from kantai.preprocessing.spans import cut
from kantai.storage.atomic import digest
from kantai.storage.remote_cache import Cache

VOCAB_SIZE = 50_000
TEXT_BYTES_PER_TOKEN = 4.4  # English with such a vocabulary
TOKENS_PER_DOCUMENT = 700
FILE_BYTES = 1 << 30
SEQ_LEN = 512
GLOBAL_BATCH_SIZE = 8192
WINDOW = 64
MAX_STEPS_LOOKED_AT = 2000
NODES = (1, 2, 8, 64, 256)
SHA256 = hashlib.sha256(b"").hexdigest()
ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=float, default=1e12, help="size of the corpus (default 1e12)"
    )
    arguments = parser.parse_args()
    print(section(int(arguments.tokens)), end="")


def section(tokens: int) -> str:
    """The section of docs/scale.md."""
    text_bytes = tokens * TEXT_BYTES_PER_TOKEN
    paths = (f"s3://corpus/{number:06d}.jsonl" for number in range(int(text_bytes / FILE_BYTES)))
    files = [File(path, FILE_BYTES, "") for path in paths]
    start = time.perf_counter()
    pieces = cut(files, splittable=lambda file: True)
    planned = time.perf_counter() - start
    content = json.dumps(made_up_manifest(tokens, len(pieces)), indent=1).encode()

    shards, sequences, order, costs = open_corpus(content)
    train = shards.splits["train"]
    sizes = shard_bytes(shards, train)
    epoch = order.samples // GLOBAL_BATCH_SIZE
    held_out = len(shards.splits["held_out"])
    on_disk = sum(entry["bytes"] for entry in shards.manifest["files"].values())
    rows = {
        f"text, at {TEXT_BYTES_PER_TOKEN} bytes a token": (
            f"{text_bytes / 1e12:.2f} TB in {len(files):,} files"
        ),
        "pieces to tokenize, each a unit of resuming": (
            f"{len(pieces):,}, planned in {1e3 * planned:.0f} ms"
        ),
        "shards": (
            f"{len(train):,} of {sizes.mean() / 1e6:.0f} MB to train on, {held_out} held out"
        ),
        "bytes on disk": f"{on_disk / 1e12:.3f} TB",
        **costs,
        f"sequences of {SEQ_LEN}": (
            f"{order.samples:,}: {epoch:,} steps of {GLOBAL_BATCH_SIZE:,} an epoch"
        ),
        "shards open at a time, of a window": f"{WINDOW}, {WINDOW * sizes.mean() / 1e9:.1f} GB",
    }
    for step in (0, 10**3, 10**6):
        rows[f"a step's order, at step {step:,}"] = f"{order_seconds(order, step) * 1e3:.1f} ms"
    looked_at = min(MAX_STEPS_LOOKED_AT, epoch)
    return TEMPLATE.format(
        tokens=f"{tokens:.0e}".replace("e+", " x 10^").replace("^0", "^"),
        rows="\n".join(f"| {what} | {how_much} |" for what, how_much in rows.items()),
        nodes="\n".join(node_rows(sequences, order, int(sizes.sum()), looked_at)),
        window=WINDOW,
        looked_at=looked_at,
    )


def open_corpus(content: bytes) -> tuple[ShardSet, Contiguous, Shuffled, dict[str, str]]:
    """The shards of a manifest, their sequences, the order, and rows of the table: their costs."""
    tracemalloc.start()
    start = time.perf_counter()
    shards = open_manifest(content)
    sequences = Contiguous(shards.splits["train"], SEQ_LEN, 0, 1)
    opened = time.perf_counter() - start
    opened_bytes = tracemalloc.get_traced_memory()[0]
    order = Shuffled(sequences.samples_per_shard, WINDOW, seed=0)
    order.at(np.arange(GLOBAL_BATCH_SIZE))
    order_bytes = tracemalloc.get_traced_memory()[0] - opened_bytes
    tracemalloc.stop()
    costs = {
        "manifest": f"{len(content) / 1e6:.1f} MB, opened in {opened:.2f} s",
        "memory of the opened set": f"{opened_bytes / 1e6:.0f} MB a process",
        "memory of the order": f"{order_bytes / 1e6:.1f} MB",
    }
    return shards, sequences, order, costs


def made_up_manifest(tokens: int, pieces: int) -> dict[str, Any]:
    """The manifest that tokenize_corpus.py would write.

    Each piece gives a training shard. Held-out shards are filled up.
    """
    sizes = np.random.default_rng(0).normal(1, 0.03, pieces) * tokens * 0.99 / pieces
    full, left = divmod(tokens // 100, SHARD_TOKENS)
    names = {"train": "train-{:06d}-000.arrow", "held_out": "held_out-{:03d}.arrow"}
    shard_tokens = {
        "train": [int(size) for size in sizes],
        "held_out": [SHARD_TOKENS] * full + [left],
    }
    splits: dict[str, dict[str, Any]] = {}
    files = {TOKEN_COUNTS: {"bytes": 16 * VOCAB_SIZE + 128, "sha256": SHA256}}
    for split, name in names.items():
        shards: list[dict[str, Any]] = [
            {"file": name.format(number), "documents": size // TOKENS_PER_DOCUMENT, "tokens": size}
            for number, size in enumerate(shard_tokens[split])
        ]
        totals = {key: sum(int(shard[key]) for shard in shards) for key in ("documents", "tokens")}
        splits[split] = {"shards": shards, **totals, "unigram_entropy": 7.0}
        for shard in shards:
            size = 2 * shard["tokens"] + 4 * shard["documents"] + 500
            files[shard["file"]] = {"bytes": size, "sha256": SHA256}
    content = {
        "kind": "shards",
        "tokenizer": SHA256,
        "vocab_size": VOCAB_SIZE,
        "dtype": token_dtype(VOCAB_SIZE).name,
        "source": {},
        "report": {},
        "splits": splits,
        "files": files,
    }
    return content | {"digest": digest(content)}


def open_manifest(content: bytes) -> ShardSet:
    """The set of shards of a manifest, as if it were at a URL."""
    fsspec.filesystem("memory").pipe("/made_up/manifest.json", content)
    with tempfile.TemporaryDirectory() as folder:
        return open_shards("memory://made_up", cache=lambda url: Cache(url, Path(folder), 1 << 30))


def shard_bytes(shards: ShardSet, split: Split) -> Any:
    """Bytes of each shard of a split, [shards]."""
    return np.array([shards.manifest["files"][name]["bytes"] for name in split.files])


def order_seconds(order: Shuffled, step: int) -> float:
    """Seconds to find the samples of one step without those of any other."""
    positions = step * GLOBAL_BATCH_SIZE + np.arange(GLOBAL_BATCH_SIZE)
    fresh = (Shuffled(order.samples_per_shard, WINDOW, order.seed) for _ in range(ROUNDS))
    return median(seconds_of(partial(each.at, positions)) for each in fresh)


def node_rows(
    sequences: Contiguous, order: Shuffled, total_bytes: int, steps: int
) -> Iterator[str]:
    """Rows of the table of downloads, one for each number of nodes."""
    for nodes in NODES:
        share, at_once = downloads(sequences, order, nodes, steps)
        yield f"| {nodes} | {share:.1%} | {share * total_bytes / 1e9:,.0f} GB | {at_once:,} |"


def downloads(sequences: Contiguous, order: Shuffled, nodes: int, steps: int) -> tuple[float, int]:
    """Look at the shards that the middle node reads in the first steps of an epoch.

    Returns:
        Their share of the shards that all nodes read, and the most shards in one step.
    """
    plan = BatchPlan(GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, nodes)
    batches = Batches([Stage(0, 0, plan, sequences, order)], no_file, 1)
    read = [batches.shards(step, nodes // 2) for step in range(steps)]
    visited = np.unique(order.at(np.arange(steps * GLOBAL_BATCH_SIZE))[1])
    shards = np.unique(np.searchsorted(sequences.first_sample, visited, side="right"))
    return len(set(itertools.chain(*read))) / len(shards), max(map(len, read))


def no_file(*_: object) -> Any:
    """Stand in for the masker, which has no rows to mask."""
    raise FileNotFoundError


TEMPLATE = """\
## A corpus of {tokens} tokens on paper

Made by `python benchmarks/scale.py`: the real code plans, opens and shuffles a made-up manifest.
No file is read.

| what | how much |
|---|---|
{rows}

A step's rows are dealt to ranks in the order of their sample ids, so a node reads from some of a
window's {window} shards and not from all. It downloads only those from a URL. The figures are of
the first {looked_at:,} steps of an epoch and of the node in the middle:

| nodes | of the shards | downloaded an epoch by each | shards read in one step |
|---|---|---|---|
{nodes}
"""


if __name__ == "__main__":
    main()
