"""What would a corpus of any size cost? Computed by the real code on a manifest that is made up: the first section of docs/scale.md.

python benchmarks/scale.py --tokens 1e12
"""

import argparse
import hashlib
import itertools
import json
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import numpy as np

from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Batches, Stage
from kantai.data.packing import Contiguous
from kantai.data.shards import SHARD_TOKENS, TOKEN_COUNTS, open_shards, token_dtype
from kantai.data.shuffle import Shuffled
from kantai.preprocessing.files import File, cut
from kantai.storage.atomic import digest
from kantai.storage.remote_cache import Cache

VOCAB_SIZE = 50_000
TEXT_BYTES_PER_TOKEN = 4.4  # English under such a vocabulary
TOKENS_PER_DOCUMENT = 700
FILE_BYTES = 1 << 30
SEQ_LEN, GLOBAL_BATCH_SIZE, WINDOW = 512, 8192, 64
UPDATES_LOOKED_AT = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=float, default=1e12, help="size of the corpus (default 1e12)"
    )
    arguments = parser.parse_args()
    print(page(int(arguments.tokens)), end="")


def page(tokens: int) -> str:
    """The section of docs/scale.md."""
    files = [
        File(f"s3://corpus/{number:06d}.jsonl", FILE_BYTES, "")
        for number in range(int(tokens * TEXT_BYTES_PER_TOKEN / FILE_BYTES))
    ]
    start = time.perf_counter()
    pieces = cut(files, splittable=lambda file: True)
    planned = time.perf_counter() - start
    content = json.dumps(made_up_manifest(tokens, len(pieces)), indent=1).encode()
    fsspec.filesystem("memory").pipe("/made_up/manifest.json", content)

    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        start = time.perf_counter()
        shards = open_shards(
            "memory://made_up", cache=lambda url: Cache(url, Path(folder), 1 << 30)
        )
    manifest, splits = shards.manifest, shards.splits
    sequences = Contiguous(splits["train"], SEQ_LEN, 0, 1)
    opened, opened_bytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[0]
    order = Shuffled(sequences.samples_per_shard, WINDOW, seed=0)
    order.at(np.arange(GLOBAL_BATCH_SIZE))
    order_bytes = tracemalloc.get_traced_memory()[0] - opened_bytes
    tracemalloc.stop()

    train = splits["train"]
    shard_bytes = np.array([manifest["files"][name]["bytes"] for name in train.files])
    epoch = order.samples // GLOBAL_BATCH_SIZE
    looked = min(UPDATES_LOOKED_AT, epoch)
    lines = [
        f"| text, at {TEXT_BYTES_PER_TOKEN} bytes a token | {tokens * TEXT_BYTES_PER_TOKEN / 1e12:.2f} TB in {len(files):,} files |",
        f"| pieces to tokenize, each a unit of resuming | {len(pieces):,}, planned in {1e3 * planned:.0f} ms |",
        f"| shards | {len(train):,} of {shard_bytes.mean() / 1e6:.0f} MB to train on, {len(splits['held_out'])} held out |",
        f"| bytes on disk | {sum(entry['bytes'] for entry in manifest['files'].values()) / 1e12:.3f} TB |",
        f"| manifest | {len(content) / 1e6:.1f} MB, opened in {opened:.2f} s |",
        f"| memory of the opened set | {opened_bytes / 1e6:.0f} MB a process |",
        f"| memory of the order | {order_bytes / 1e6:.1f} MB |",
        f"| sequences of {SEQ_LEN} | {order.samples:,}: {epoch:,} steps of {GLOBAL_BATCH_SIZE:,} an epoch |",
        f"| shards open at a time, of a window | {WINDOW}, {WINDOW * shard_bytes.mean() / 1e9:.1f} GB |",
        *(
            f"| a step's order, at step {step:,} | {milliseconds(order, step):.1f} ms |"
            for step in (0, 10**3, 10**6)
        ),
    ]
    table = [
        f"| {nodes} | {share:.1%} | {share * shard_bytes.sum() / 1e9:,.0f} GB | {at_once:,} |"
        for nodes, (share, at_once) in (
            (nodes, downloads(sequences, order, nodes, looked)) for nodes in (1, 2, 8, 64, 256)
        )
    ]
    return TEMPLATE.format(
        tokens=f"{tokens:.0e}".replace("e+", " x 10^").replace("^0", "^"),
        lines="\n".join(lines),
        table="\n".join(table),
        window=WINDOW,
        looked=looked,
    )


def made_up_manifest(tokens: int, pieces: int) -> dict[str, Any]:
    """What tokenize_corpus.py would write: a shard a piece of training documents, held-out shards filled up."""
    sizes = np.random.default_rng(0).normal(1, 0.03, pieces) * tokens * 0.99 / pieces
    full, left = divmod(tokens // 100, SHARD_TOKENS)
    sha256 = hashlib.sha256(b"").hexdigest()
    splits: dict[str, dict[str, Any]] = {}
    files = {TOKEN_COUNTS: {"bytes": 16 * VOCAB_SIZE + 128, "sha256": sha256}}
    for split, name, tokens_of_shards in (
        ("train", "train-{:06d}-000.arrow", [int(size) for size in sizes]),
        ("held_out", "held_out-{:03d}.arrow", [SHARD_TOKENS] * full + [left]),
    ):
        shards = [
            {"file": name.format(number), "documents": size // TOKENS_PER_DOCUMENT, "tokens": size}
            for number, size in enumerate(tokens_of_shards)
        ]
        splits[split] = {
            "shards": shards,
            **{key: sum(int(shard[key]) for shard in shards) for key in ("documents", "tokens")},
            "unigram_entropy": 7.0,
        }
        files |= {
            shard["file"]: {
                "bytes": 2 * shard["tokens"] + 4 * shard["documents"] + 500,
                "sha256": sha256,
            }
            for shard in shards
        }
    content = {
        "kind": "shards",
        "tokenizer": sha256,
        "vocab_size": VOCAB_SIZE,
        "dtype": token_dtype(VOCAB_SIZE).name,
        "source": {},
        "report": {},
        "splits": splits,
        "files": files,
    }
    return content | {"digest": digest(content)}


def downloads(sequences: Contiguous, order: Shuffled, nodes: int, steps: int) -> tuple[float, int]:
    """Share of the training shards that a node reads in an epoch, from the first steps of one; and most shards in one step."""
    batches = Batches(
        [Stage(0, 0, BatchPlan(GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, nodes), sequences, order)],
        no_file,
        1,
    )
    middle = nodes // 2
    read = [batches.shards(step, middle) for step in range(steps)]
    visited = np.unique(order.at(np.arange(steps * GLOBAL_BATCH_SIZE))[1])
    shards = np.unique(np.searchsorted(sequences.first_sample, visited, side="right"))
    return len(set(itertools.chain(*read))) / len(shards), max(map(len, read))


def milliseconds(order: Shuffled, step: int) -> float:
    """To find the samples of one step, with nothing known from others."""
    found = []
    for _ in range(20):
        fresh = Shuffled(order.samples_per_shard, order.window, order.seed)
        start = time.perf_counter()
        fresh.at(step * GLOBAL_BATCH_SIZE + np.arange(GLOBAL_BATCH_SIZE))
        found.append(time.perf_counter() - start)
    return median(found) * 1e3


def no_file(*_: object) -> Any:
    """There are none."""
    raise FileNotFoundError


TEMPLATE = """\
## A corpus of {tokens} tokens on paper

Made by `python benchmarks/scale.py`: the real code that plans, opens and shuffles, on a manifest that is made up. No file is read.

| what | how much |
|---|---|
{lines}

A step's rows are dealt to ranks in the order of their sample ids, so a node reads from some of a window's {window} shards
and not from all. From a URL, it downloads those alone (from the first {looked:,} steps of an epoch, the node in the middle):

| nodes | of the shards | downloaded an epoch by each | shards read in one step |
|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
