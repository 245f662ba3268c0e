"""A tokenizing job: everything that decides the bytes of the shards, and what is done so far."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kantai.data.rng import Int64s, TokenIds
from kantai.data.shards import SPLITS
from kantai.data.tokenizer import Vocabulary, load_tokenizer
from kantai.output import redact
from kantai.preprocessing.documents import Unit
from kantai.preprocessing.records import OnError
from kantai.preprocessing.spans import Piece
from kantai.storage.atomic import Damaged, check_output, digest, read_manifest

TRAIN, HELD_OUT = SPLITS
_FORMAT = 2  # of the finished pieces; pieces of another format are made again
_TOKENS_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the shards."""

    pieces: list[Piece]
    unit: Unit | None  # what one document is; None: lines of text, records of the rest
    text_field: str | list[str]  # the field of a record that holds its text, or several
    tokenizer: Path
    output: Path  # the folder to publish
    source: dict[str, Any]  # a note on the input, for the manifest
    held_out_share: float = 0.01  # share of the documents that goes to the held-out split
    unique: bool = False  # deduplicate: keep only the first of a split's documents with equal text
    held_out_pieces: list[Piece] = field(default_factory=list)  # the user's own, for the share
    on_error: OnError = "fail"  # whether a bad record is refused, or left out and counted

    @cached_property
    def all_pieces(self) -> list[Piece]:
        """The pieces by their number: those of the input, then those of the user's own split."""
        return [*self.pieces, *self.held_out_pieces]

    @property
    def keeps_fingerprints(self) -> bool:
        """Whether equal documents are looked for."""
        return self.unique or bool(self.held_out_pieces)

    def held_out_share_of(self, number: int) -> float:
        """Return the share of a piece's documents that is held out."""
        if not self.held_out_pieces:
            return self.held_out_share
        return float(number >= len(self.pieces))

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
            # Another signature or password of the same URL makes no other pieces.
            (redact(span.file.path), span.file.size, span.file.version, span.start, span.stop)
            for span in self.all_pieces[number]
        ]
        formats = sorted({span.file.format for span in self.all_pieces[number]})
        reading = (self.unit, self.text_field, formats, self.on_error)
        share = self.held_out_share_of(number)
        settings = (self.vocabulary.fingerprint, share, self.unique, self.keeps_fingerprints)
        return digest([_FORMAT, spans, *reading, *settings])

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
            if record.pop("digest") != digest(record) or record["key"] != self.key(number):
                return None
            for path, entry in self.files(number, record):
                if path.stat().st_size != entry["bytes"]:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return dict(record)

    def files(self, number: int, record: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the files of a finished piece, each with its size and hash."""
        yield self.arrays_path(number), record["arrays"]
        for split in SPLITS:
            for shard in record[split]:
                yield self.shard_path(shard["file"]), shard

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


def refuse_output(job: Job) -> None:
    """Raise an error if the output is a URL, or exists.

    A merge that was killed may have published it without removing its pieces; they are removed
    here, but from no folder that a merge did not publish.
    """
    if job.output.exists() and _is_published(job.output):
        shutil.rmtree(job.output / job.work.name, ignore_errors=True)
    check_output(job.output)


def _is_published(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder).get("kind") == "shards")
    except Damaged:
        return False


def count_tokens(tokens: TokenIds, vocab_size: int) -> Int64s:
    """Count how often each entry of the vocabulary occurs, [vocab_size].

    Slices are counted one by one, since ``bincount`` makes eight bytes of every token.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _TOKENS_COUNTED_AT_ONCE):
        part = tokens[start : start + _TOKENS_COUNTED_AT_ONCE]
        counts += np.bincount(part, minlength=vocab_size)
    return counts
