"""JSON lines: files of one record a line, of any length."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, containing: str = "") -> Iterator[dict[str, Any]]:
    """Yield the records of a file; skip lines that are none, such as one cut short by a kill.

    Args:
        containing: skip lines without this text, too, which is quick.
    """
    text = containing.encode()
    with path.open("rb") as file:
        for line in file:
            record = _record(line) if text in line else None
            if record is not None:
                yield record


def read_json_lines_backwards(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a file, last first, each with the offset of its line."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while end > 0:
                start = content.rfind(b"\n", 0, end - 1) + 1
                record = _record(content[start:end])
                if record is not None:
                    yield start, record
                end = start


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
