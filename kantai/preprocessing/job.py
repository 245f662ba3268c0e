"""A tokenizing job: everything that decides the bytes of the resulting shards, and what is done of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kantai.data.rng import Int64s
from kantai.data.shards import SPLITS
from kantai.data.tokenizer import Vocabulary, load_tokenizer
from kantai.preprocessing.documents import Unit
from kantai.preprocessing.files import Piece
from kantai.storage.atomic import digest

TRAIN, HELD_OUT = SPLITS
_FORMAT = 1  # of the pieces; those of another one are made again
_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Job:
    """What is to be tokenized, and how: everything that decides the bytes of the result."""

    pieces: list[Piece]
    unit: Unit | None
    text_field: str
    tokenizer: Path
    output: Path
    source: dict[str, Any]  # noted in the manifest
    held_out_share: float = 0.01
    unique: bool = False  # of documents with the same text, only the first is kept

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The opened tokenizer."""
        return load_tokenizer(self.tokenizer)

    @property
    def work(self) -> Path:
        """Where the pieces are until the folder is published."""
        return self.output.absolute().with_name(f".{self.output.name}.partial") / "pieces"

    def key(self, number: int) -> str:
        """A digest of all that a piece's shards depend on."""
        spans = [(span.file.path, span.file.size, span.file.version, span.start, span.stop) for span in self.pieces[number]]
        return digest([_FORMAT, spans, self.unit, self.text_field, self.vocabulary.fingerprint, self.held_out_share, self.unique])

    def finished_piece(self, number: int) -> dict[str, Any] | None:
        """What was noted of a piece when it was done; None while it is not, or where it was made from something else."""
        try:
            found = json.loads((self.work / f"{number:06d}.json").read_text(encoding="utf-8"))
            if found["key"] != self.key(number) or not (self.work / f"{number:06d}.npz").exists():
                return None
            shards = [shard for split in SPLITS for shard in found[split]]
            whole = all(self.shard(shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(found) if whole else None

    def duplicates(self, number: int, split: str) -> Int64s:
        """Those documents of a piece that are in the set already and are to be left out."""
        path = self.work / f"{number:06d}-{split}.duplicates"
        return np.sort(np.fromfile(path, "<u4").astype(np.int64)) if self.unique and path.exists() else np.zeros(0, np.int64)

    def shard(self, name: str) -> Path:
        """Where a piece's shard is: :func:`merge` moves them one by one."""
        path = self.work / name
        return path if path.exists() else self.work.parent / name


def count_tokens(tokens: npt.NDArray[Any], vocab_size: int) -> Int64s:
    """How often each entry of the vocabulary occurs; in slices, since ``bincount`` makes eight bytes of every token."""
    slices = (tokens[start : start + _COUNTED_AT_ONCE] for start in range(0, len(tokens), _COUNTED_AT_ONCE))
    return sum((np.bincount(part, minlength=vocab_size) for part in slices), np.zeros(vocab_size, np.int64))


def read_arrays(job: Job, number: int) -> Any:
    with np.load(job.work / f"{number:06d}.npz", allow_pickle=False) as arrays:
        return dict(arrays)
