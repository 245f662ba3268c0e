"""Where are the tokens? Shards: Hugging Face Arrow files, a document a row, mapped into memory without a copy.

A shard is one Arrow record batch with the one column ``input_ids``: its values buffer is the token stream, in which every document
ends with ``</s>``, and its offsets are the document boundaries. ``datasets.load_dataset("arrow", data_files=...)`` reads it too.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kantai import UserError
from kantai.checkpoint import Damaged, staged, verify

SPLITS = ("train", "held_out")
SHARD_TOKENS = 1 << 26
_DOCUMENTS_A_BATCH = 1024
_MOST_UINT16_IDS = 1 << 16


@dataclass(frozen=True)
class Shard:
    """The tokens of a shard (uint16 or uint32) and its ``documents + 1`` boundaries (int32), both memory-mapped."""

    tokens: npt.NDArray[Any]
    boundaries: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ShardSet:
    """An opened folder of shards: the manifest, and the shards of each split in order."""

    manifest: dict[str, Any]
    splits: dict[str, tuple[Shard, ...]]


def write_shards(
    documents: Iterable[str],
    output: Path,
    *,
    encode: Callable[[list[str]], list[list[int]]],
    vocab_size: int,
    eos_id: int,
    fingerprint: str,
    source: dict[str, Any],
    held_out_share: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenize documents into a sealed folder of shards and return its manifest.

    Args:
        documents: texts; which split one belongs to is decided by its hash, so the same text always lands in the same.
        encode: ids of a list of texts, without special tokens.
        vocab_size: of the tokenizer; up to 65,536 a token takes two bytes.
        eos_id: appended to every document.
        fingerprint: of the tokenizer, noted in the manifest.
        source: where the documents came from, noted in the manifest.
        held_out_share: share of the documents that is never trained on.
        shard_tokens: tokens after which a shard is closed.

    Raises:
        UserError: no documents, or none of them fell into one of the splits.
    """
    if not 0 < held_out_share < 1:
        raise UserError(f"--held_out {held_out_share} must lie between 0 and 1")
    dtype = np.dtype(np.uint16 if vocab_size <= _MOST_UINT16_IDS else np.uint32)
    meta: dict[str, Any] = {
        "kind": "shards",
        "tokenizer": fingerprint,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "source": source,
        "splits": {},
    }
    with staged(output, **meta) as folder:
        writers = {name: _SplitWriter(folder, name, dtype, shard_tokens, vocab_size) for name in SPLITS}
        for texts in _batched(documents):
            for text, ids in zip(texts, encode(list(texts)), strict=True):
                writers["held_out" if _position(text) < held_out_share else "train"].add([*ids, eos_id])
        for name, writer in writers.items():
            meta["splits"][name] = writer.close(eos_id)
        if not meta["splits"]["train"]["documents"]:
            raise UserError(
                "no documents to train on: the input has no text"
                if not meta["splits"]["held_out"]["documents"]
                else "no documents to train on: lower --held_out"
            )
        if not meta["splits"]["held_out"]["documents"]:
            raise UserError(
                f"none of {meta['splits']['train']['documents']} documents was held out: raise --held_out, or cut smaller documents"
            )
    return meta


def open_shards(folder: Path, *, hashes: bool = True) -> ShardSet:
    """Map a folder of shards into memory.

    Args:
        hashes: compare every byte with the manifest's SHA-256, not only the sizes.

    Raises:
        UserError: not a folder of shards, or one that is not as it was written.
    """
    if not folder.is_dir():
        raise UserError(f"no shards at {folder}: write them with scripts/tokenize_corpus.py")
    try:
        manifest = verify(folder, hashes=hashes)
        dtype = np.dtype(manifest["dtype"])
        splits = {name: tuple(_open(folder / file, dtype) for file in manifest["splits"][name]["shards"]) for name in SPLITS}
    except Damaged as damage:
        raise UserError(f"damaged shards: {damage}; write them again with scripts/tokenize_corpus.py") from None
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        raise UserError(f"{folder} is not a folder of shards: write one with scripts/tokenize_corpus.py") from None
    return ShardSet(manifest, splits)


class _SplitWriter:
    """Collects one split's documents and writes a shard whenever enough tokens came together."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, vocab_size: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.counts = np.zeros(vocab_size, np.int64)
        self.documents = 0
        self.shards: list[str] = []
        self._start()

    def _start(self) -> None:
        self.pieces: list[npt.NDArray[Any]] = []
        self.boundaries = [0]

    def add(self, ids: list[int]) -> None:
        if self.boundaries[-1] and self.boundaries[-1] + len(ids) > self.shard_tokens:
            self._write()
        self.pieces.append(np.array(ids, self.dtype))
        self.boundaries.append(self.boundaries[-1] + len(ids))

    def close(self, eos_id: int) -> dict[str, Any]:
        """Write what is left; return the split's manifest entry."""
        self._write()
        words = np.delete(self.counts, eos_id)
        shares = words[words > 0] / max(1, words.sum())
        return {
            "shards": self.shards,
            "documents": self.documents,
            "tokens": int(self.counts.sum()),
            # In nats a token: the loss of a model that knows the frequency of every token and nothing else.
            "unigram_entropy": float(-(shares * np.log(shares)).sum()),
        }

    def _write(self) -> None:
        if not self.pieces:
            return
        tokens = np.concatenate(self.pieces)
        name = f"{self.split}-{len(self.shards):05d}.arrow"
        column = pa.ListArray.from_arrays(pa.array(self.boundaries, pa.int32()), pa.array(tokens))
        batch = pa.record_batch([column], names=["input_ids"])
        with pa.OSFile(str(self.folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.documents += len(self.pieces)
        self.shards.append(name)
        self._start()


def _open(path: Path, dtype: np.dtype[Any]) -> Shard:
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    column = table.column("input_ids").chunk(0)
    tokens = column.values.to_numpy(zero_copy_only=True)
    if tokens.dtype != dtype:
        raise ValueError(path)
    return Shard(tokens, column.offsets.to_numpy(zero_copy_only=True))


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) * 2.0**-56


def _batched(documents: Iterable[str]) -> Iterator[tuple[str, ...]]:
    iterator = iter(documents)
    while batch := tuple(itertools.islice(iterator, _DOCUMENTS_A_BATCH)):
        yield batch
