"""Write and read files of text and shards."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kantai.data.shards import Shard, open_shards
from kantai.preprocessing.documents import Unit, documents
from kantai.preprocessing.files import find_files
from kantai.preprocessing.lines import Report
from kantai.preprocessing.spans import Span

EOS = 2


def write_file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_documents(
    paths: Sequence[Path],
    unit: Unit | None = None,
    text_field: str = "text",
    report: Report | None = None,
) -> Iterable[str]:
    """Return the documents of whole files."""
    whole = tuple(Span(file, 0, file.size) for file in find_files([str(path) for path in paths]))
    return documents(whole, unit, text_field, report)


def documents_of(shard: Shard) -> list[tuple[int, ...]]:
    """Return the documents between a shard's boundaries; each must end with ``</s>``."""
    assert shard.boundaries[0] == 0 and shard.boundaries[-1] == len(shard.tokens)
    found = [tuple(part.tolist()) for part in np.split(shard.tokens, shard.boundaries[1:-1])]
    assert all(document[-1] == EOS for document in found)
    assert [len(document) for document in found] == shard.lengths.tolist()
    return found


def split_documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    """Return the documents of a split in their order."""
    return [
        document for shard in open_shards(folder).splits[split] for document in documents_of(shard)
    ]
