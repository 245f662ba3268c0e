"""Which documents? Text, JSON lines, CSV and Parquet, compressed or not, cut into lines, paragraphs, files or records."""

import argparse
import csv
import glob
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from kantai import UserError

Unit = Literal["line", "paragraph", "file", "record"]
UNITS: tuple[Unit, ...] = get_args(Unit)

_RECORD_SUFFIXES = {".jsonl", ".csv", ".parquet"}
_COMPRESSED_SUFFIXES = {".gz", ".xz", ".zst"}


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files behind paths, directories (all files below, hidden ones left out) and globs, in a fixed order.

    Raises:
        UserError: an input matches nothing, or a file is empty.
    """
    found: list[Path] = []
    for pattern in inputs:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(
                p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        if not matches:
            raise UserError(f"no input at {pattern}: give a text, .jsonl, .csv or .parquet file, a directory of them, or a quoted glob")
        found += matches
    files = list(dict.fromkeys(found))
    for path in files:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: leave it out, or see what was to write it")
    return files


def documents(files: Sequence[Path], unit: Unit | None = None, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of files in order; blank ones are left out.

    Args:
        files: ``.jsonl``, ``.csv`` (with a line of names) and ``.parquet`` are read as records, anything else as UTF-8 text; what ends
            in ``.gz``, ``.xz`` or ``.zst`` is decompressed first.
        unit: what one document is: a ``line``; a ``paragraph``, ended by a blank line, its lines joined by a space, since
            where a line was wrapped says nothing; a whole ``file``; a ``record``. Default: lines of text, records of the rest.
        text_field: the field or column of a record that holds its text.

    Raises:
        UserError: a file is not UTF-8 text, or not what its name says, or has no such field.
    """
    for path in files:
        is_records = _kind(path) in _RECORD_SUFFIXES
        if unit is not None and is_records != (unit == "record"):
            expected = "record" if is_records else "line, paragraph or file"
            raise UserError(f"{path} cannot be cut by --document {unit}: give {expected}")
        if is_records:
            texts = _records(path, text_field)
        elif unit == "file":
            texts = iter(["\n".join(_lines(path))])
        elif unit == "paragraph":
            texts = _paragraphs(_lines(path))
        else:
            texts = _lines(path)
        yield from (text for text in texts if text and not text.isspace())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments by which a program is told of a corpus; see :func:`documents`."""
    kinds = "text, .jsonl, .csv or .parquet files (also .gz, .xz, .zst), directories, quoted globs"
    parser.add_argument("--input", nargs="+", required=True, help=kinds)
    parser.add_argument("--document", choices=UNITS, help="what a document is (default: lines of text, records of the others)")
    parser.add_argument("--text_field", default="text", help="field of a record that has its text (default text)")


def with_bar(texts: Iterable[str], files: Sequence[Path]) -> Iterator[str]:
    """Pass the documents of files on, with a progress bar in bytes on a terminal."""
    # How much text is in a compressed file is not known before its end.
    total = None if any(path.suffix in _COMPRESSED_SUFFIXES for path in files) else sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not sys.stderr.isatty()) as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode()))


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, behind that of a compression."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED_SUFFIXES else path.suffix


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        import pyarrow as pa  # reads all frames and notices a missing end, which zstandard's own stream reader does not

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in _decoded(path))


def _decoded(path: Path) -> Iterator[str]:
    """Lines of a file with their ends."""
    with _open(path) as file:
        number = 0
        while line := _next_line(file, path, number):
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path} line {number} is not UTF-8: convert it first, as with iconv -f LATIN1 -t UTF-8") from None
            if "\0" in text:
                raise UserError(f"{path} line {number} has a NUL byte: it is binary, or text of another encoding than UTF-8")
            yield text


def _next_line(file: io.BufferedIOBase, path: Path, number: int) -> bytes:
    try:
        return file.readline()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read beyond line {number}, it is damaged or cut off: {error}") from None


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line and not line.isspace():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    yield " ".join(paragraph)


def _records(path: Path, text_field: str) -> Iterator[str]:
    for number, row in enumerate(_rows(path, text_field), 1):
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path} record {number} has no text in its field {text_field!r}: name the right one with --text_field")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{path} record {number} has half a surrogate pair, which no text has: mend or remove it")
        yield text


def _rows(path: Path, text_field: str) -> Iterator[Any]:
    if _kind(path) == ".csv":
        csv.field_size_limit(sys.maxsize)  # a document may be longer than the library's 128 KiB
        try:
            yield from csv.DictReader(_decoded(path), strict=True)
        except csv.Error as error:
            raise UserError(f"{path} is not CSV: {error}") from None
        return
    if _kind(path) == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line and not line.isspace():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    raise UserError(f"{path} line {number} is not JSON") from None
        return
    import pyarrow as pa  # only here: a second of start-up that text does not need
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = [text_field] if text_field in file.schema_arrow.names else []
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist() if columns else [None]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable Parquet file with UTF-8 text: {error}") from None
