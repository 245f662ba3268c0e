"""A tokenizing job: everything that decides the bytes of the shards, and what is done so far."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kantai.data.rng import Int64s, TokenIds
from kantai.data.shards import SPLITS
from kantai.data.tokenizer import Vocabulary, load_tokenizer
from kantai.preprocessing.documents import Unit
from kantai.preprocessing.files import Piece
from kantai.preprocessing.records import OnError
from kantai.storage.atomic import digest

TRAIN, HELD_OUT = SPLITS
_FORMAT = 1  # of the finished pieces; pieces of another format are made again
_TOKENS_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the shards.

    Attributes:
        pieces: the input.
        unit: what one document is; None: lines of text, records of the rest.
        text_field: the field of a record that holds its text, or several.
        tokenizer: the tokenizer's folder.
        output: the folder to publish.
        source: a note on the input, for the manifest.
        held_out_share: share of the documents that goes to the held-out split.
        unique: whether to deduplicate: keep only the first of the documents with the same text.
        on_error: whether a bad record is refused, or left out and counted.
    """

    pieces: list[Piece]
    unit: Unit | None
    text_field: str | list[str]
    tokenizer: Path
    output: Path
    source: dict[str, Any]
    held_out_share: float = 0.01
    unique: bool = False
    on_error: OnError = "fail"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The opened tokenizer."""
        return load_tokenizer(self.tokenizer)

    @property
    def work(self) -> Path:
        """The folder that holds the pieces until the output is published."""
        return self.output.absolute().with_name(f".{self.output.name}.partial") / "pieces"

    def key(self, number: int) -> str:
        """Return a digest of everything that decides the shards of a piece."""
        spans = [
            (span.file.path, span.file.size, span.file.version, span.start, span.stop)
            for span in self.pieces[number]
        ]
        names = self.text_field
        text_field = names if isinstance(names, str) or len(names) > 1 else names[0]
        settings = (self.unit, text_field, self.vocabulary.fingerprint, self.held_out_share)
        # Only what differs from the default is added: pieces of earlier releases keep their keys.
        stated = sorted({span.file.format for span in self.pieces[number]} - {""})
        added = [f"format {name}" for name in stated]
        if self.on_error != "fail":
            added.append(f"on_error {self.on_error}")
        return digest([_FORMAT, spans, *settings, self.unique, *added])

    def record_path(self, number: int) -> Path:
        """Return the path of a piece's record: its key, shards and report."""
        return self.work / f"{number:06d}.json"

    def arrays_path(self, number: int) -> Path:
        """Return the path of a piece's token counts, and fingerprints of its documents."""
        return self.work / f"{number:06d}.npz"

    def duplicates_path(self, number: int, split: str) -> Path:
        """Return the path of the list of a piece's duplicates."""
        return self.work / f"{number:06d}-{split}.duplicates"

    def shard_path(self, name: str) -> Path:
        """Return the path of a piece's shard, which a merge moves to the folder above."""
        path = self.work / name
        return path if path.exists() else self.work.parent / name

    def read_record(self, number: int) -> dict[str, Any] | None:
        """Read the record of a piece; None if it is not finished, or was made from other input."""
        try:
            record = json.loads(self.record_path(number).read_text(encoding="utf-8"))
            if record["key"] != self.key(number) or not self.arrays_path(number).exists():
                return None
            for split in SPLITS:
                for shard in record[split]:
                    if self.shard_path(shard["file"]).stat().st_size != shard["bytes"]:
                        return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(record)

    def read_arrays(self, number: int) -> dict[str, Any]:
        """Read a piece's token counts, and fingerprints of its documents by split."""
        with np.load(self.arrays_path(number), allow_pickle=False) as arrays:
            return dict(arrays)

    def read_duplicates(self, number: int, split: str) -> Int64s:
        """Read which documents of a piece are duplicates of earlier ones, in order."""
        path = self.duplicates_path(number, split)
        if not self.unique or not path.exists():
            return np.zeros(0, np.int64)
        return np.sort(np.fromfile(path, "<u4").astype(np.int64))


def count_tokens(tokens: TokenIds, vocab_size: int) -> Int64s:
    """Count how often each entry of the vocabulary occurs, [vocab_size].

    Slices are counted one by one, since ``bincount`` makes eight bytes of every token.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _TOKENS_COUNTED_AT_ONCE):
        part = tokens[start : start + _TOKENS_COUNTED_AT_ONCE]
        counts += np.bincount(part, minlength=vocab_size)
    return counts
