"""Which documents? Text, JSON lines, CSV, Parquet and data sets of the Hub, cut into lines, paragraphs, files or records.

What is not as it should be is repaired and counted in a :class:`Report`; nothing is lost without a word. Bytes that are not UTF-8, halves
of surrogate pairs and NUL characters become U+FFFD; more than one such document in a hundred, and the text is of another encoding, which
is refused. A byte order mark is removed, ``\r\n`` ends a line as ``\n`` does (and nothing else does), and what is blank is no document.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from tqdm import tqdm

from kantai.errors import UserError
from kantai.preprocessing.files import HUB, MIB, File, Piece, Span, cut, hub_dataset, open_file
from kantai.preprocessing.lines import MAX_DOCUMENT_BYTES, Block, Report, check_length, read_lines, repaired

Unit = Literal["line", "paragraph", "file", "record"]
UNITS: tuple[Unit, ...] = get_args(Unit)
_MAX_REPAIRED = 0.01  # share of a piece's documents; in text of another encoding it is more
# What is held of records at once: texts of so many bytes, or one that is larger, out of so many records.
_BATCH_BYTES, _BATCH_RECORDS = 1 << 22, 64


def pieces(files: Iterable[File], unit: Unit | None = None, piece_bytes: int | None = None) -> list[Piece]:
    """Cut files into pieces that can be read alone; see :func:`kantai.preprocessing.files.cut` for their size.

    Raises:
        UserError: a file cannot be cut into such documents.
    """
    files = list(files)
    for file in files:
        _check_unit(file, unit)
    return cut(files, splittable=lambda file: splittable(file, unit), piece_bytes=piece_bytes)


def splittable(file: File, unit: Unit | None) -> bool:
    """Whether spans of a file can be read alone: uncompressed text and JSON lines at their lines, Parquet at its row groups.

    A quoted field of a CSV file may have line ends, so where a record begins is known only to who has read all before it.
    """
    kind, compression = file.suffixes
    return not compression and kind != ".csv" and unit != "file"


def documents(piece: Piece, unit: Unit | None = None, text_field: str = "text", report: Report | None = None) -> Iterator[str]:
    """Yield the documents of a piece in order.

    However a file is cut into spans, they have the documents of the whole: a line belongs to the span with its first byte, a row group
    of Parquet likewise, and paragraphs part at the first blank line that begins at or after the cut.

    Args:
        piece: of files ``.jsonl``, ``.ndjson`` and ``.json`` (one record a line), ``.csv`` (with a line of names) and ``.parquet``,
            which have records, as data sets of the Hub do; anything else is text. What ends in ``.gz``, ``.xz`` or ``.zst`` is
            decompressed first.
        unit: what one document is: a ``line``; a ``paragraph``, ended by a blank line, its lines joined by a space, since
            where a line was wrapped says nothing; a whole ``file``; a ``record``. Default: lines of text, records of the rest.
        text_field: the field or column of a record that holds its text; null there is an empty document.
        report: takes in what was read when the iteration ends.

    Raises:
        UserError: a file cannot be read to its end, or is not what its name says, or has no such field; a document is longer than
            256 MiB; more than one document in a hundred of the piece had to be repaired.
    """
    read = Report()
    try:
        for span in piece:
            _check_unit(span.file, unit)
            if not span.file.size:
                read.count("empty_files", span.file.path)
                continue
            for texts in _reader(span, unit, text_field)(span, read):
                kept = [text for text in texts if text and not text.isspace()]
                read.documents += len(kept)
                read.empty += len(texts) - len(kept)
                read.characters += sum(map(len, kept))
                yield from kept
        if read.replaced > _MAX_REPAIRED * read.documents:
            raise UserError(_wrong_encoding(read))
    finally:
        if report is not None:
            report.add(read)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments by which a program is told of a corpus; see :func:`documents`."""
    kinds = (
        "text, .jsonl (.json, .ndjson), .csv or .parquet files (also .gz, .xz, .zst), directories, quoted globs, URLs (s3://...), "
        "hub:NAME[:CONFIG[:SPLIT]]"
    )
    parser.add_argument("--input", nargs="+", required=True, help=kinds)
    parser.add_argument("--document", choices=UNITS, help="what a document is (default: lines of text, records of the others)")
    parser.add_argument("--text_field", default="text", help="field of a record that has its text (default text)")


def with_bar(texts: Iterable[str], total: int, doing: str) -> Iterator[str]:
    """Pass documents on, with a progress bar in characters on a terminal; ``total`` is about how many there will be."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not sys.stderr.isatty()) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


# Readers take a span and a report, and yield lists of texts: a list is filtered and counted many times faster than text by text.
_Reader = Callable[[Span, Report], Iterator[Sequence[str]]]


def _reader(span: Span, unit: Unit | None, text_field: str) -> _Reader:
    if span.file.path.startswith(HUB):
        return lambda span, report: _hub(span, text_field, report)
    if records := _RECORD_READERS.get(span.file.suffixes[0]):
        return lambda span, report: records(span, text_field, report)
    return {"paragraph": _paragraphs, "file": _whole_file}.get(unit or "line", _lines)


def _check_unit(file: File, unit: Unit | None) -> None:
    has_records = file.path.startswith(HUB) or file.suffixes[0] in _RECORD_READERS
    if unit is not None and has_records != (unit == "record"):
        raise UserError(f"{file.path} cannot be cut by --document {unit}: give {'record' if has_records else 'line, paragraph or file'}")


def _wrong_encoding(report: Report) -> str:
    share = f"as {report.replaced:,} of {report.documents:,} documents"
    if "invalid_utf8" in report.first:
        return f"{report.first['invalid_utf8']} is not UTF-8, {share}: convert it first, as with iconv -f LATIN1 -t UTF-8"
    return f"{report.first['nul']} has a NUL byte, {share}: it is binary, or text of another encoding than UTF-8"


def _blocks(span: Span, report: Report) -> Iterator[Block]:
    if span.start < span.stop:
        with open_file(span.file, max(span.start - 1, 0)) as content:
            stop = None if span.stop == span.file.size else span.stop  # which for a compressed file is no place in its text
            yield from read_lines(content, span.file.path, span.start, stop, report)


def _lines(span: Span, report: Report) -> Iterator[list[str]]:
    for block in _blocks(span, report):
        if not block.inside:
            return
        for index in block.defects:
            report.count_repaired(block.defects_at(index))
        yield block.lines


def _paragraphs(span: Span, report: Report) -> Iterator[list[str]]:
    lines: list[str] = []
    length = 0
    defects: dict[str, str] = {}
    in_the_one_before = span.start > 0
    for block in _blocks(span, report):
        if in_the_one_before and not block.inside:
            return
        texts = []
        for index, line in enumerate(block.lines):
            blank = not line or line.isspace()
            if in_the_one_before:
                in_the_one_before = not blank
            elif not blank:
                lines.append(line.strip())
                length += len(line)
                if block.defects:
                    defects = block.defects_at(index) | defects
            elif lines:
                texts.append(" ".join(lines))
                report.count_repaired(defects)
                lines, length, defects = [], 0, {}
            if blank and not block.inside:
                yield texts
                return
        check_length(length, block.place(0))
        yield texts
    report.count_repaired(defects)
    yield [" ".join(lines)] if lines else []


def _whole_file(span: Span, report: Report) -> Iterator[list[str]]:
    lines: list[str] = []
    defects: dict[str, str] = {}
    for block in _blocks(span, report):
        check_length(block.offset + len(block.raw), span.file.path)
        lines += block.lines
        for index in block.defects:
            defects = block.defects_at(index) | defects
    report.count_repaired(defects)
    yield ["\n".join(lines)]


def _json_lines(span: Span, text_field: str, report: Report) -> Iterator[list[str]]:
    for block in _blocks(span, report):
        if not block.inside:
            return
        texts = []
        for index, line in enumerate(block.lines):
            if not line or line.isspace():
                texts.append("")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(_NO_RECORD.format(block.place(index)))
            if not isinstance(text := row.get(text_field, 0), str | None):
                raise UserError(_no_text(block.place(index), text_field))
            defects = block.defects_at(index)
            if text and "\\u" in line:
                text, escaped = repaired(text)
                defects |= dict.fromkeys(escaped, block.place(index)) if escaped else {}
            report.count_repaired(defects)
            texts.append(text or "")
        yield texts


def _csv(span: Span, text_field: str, report: Report) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    defects: dict[str, str] = {}

    def lines() -> Iterator[str]:
        for block in _blocks(span, report):
            for index, line in enumerate(block.lines):
                defects.update(block.defects_at(index) | defects)
                yield line + "\n"

    rows = csv.reader(lines(), strict=True)  # no DictReader, which leaves out blank rows without a word
    try:
        names = next(rows, [])
        for row in rows:
            if text_field not in names:
                raise UserError(_no_text(f"{span.file.path} record 1", text_field))
            place = names.index(text_field)
            report.count_repaired(defects)
            defects.clear()
            yield row[place : place + 1] or [""]
    except csv.Error as error:
        raise UserError(f"{span.file.path} is not CSV: {error}") from None


def _parquet(span: Span, text_field: str, report: Report) -> Iterator[list[str]]:
    import pyarrow as pa  # only here: a second of start-up that text does not need
    import pyarrow.parquet as pq

    path = span.file.path
    try:
        # With a buffer, a column is read page by page (as Arrow writes them, a MiB or 1,024 records) and not whole.
        with open_file(span.file) as content, pq.ParquetFile(content, buffer_size=MIB, pre_buffer=False) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(_no_text(f"{path} record 1", text_field))
            number = 1
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                first = group.column(0)
                offset = first.dictionary_page_offset if first.has_dictionary_page else first.data_page_offset
                if span.start <= offset < span.stop:
                    columns = (group.column(each) for each in range(group.num_columns))
                    stored = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)
                    records = max(1, min(_BATCH_RECORDS, _BATCH_BYTES * group.num_rows // max(1, stored)))
                    yield from _columns(file.iter_batches(records, [index], [text_field]), path, number, text_field, report)
                number += group.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _hub(span: Span, text_field: str, report: Report) -> Iterator[list[str]]:
    path = f"{span.file.path} shard {span.start}"
    try:
        data = hub_dataset(span.file.path).shard(num_shards=span.file.size, index=span.start).with_format("arrow")
        if text_field not in (data.column_names or [text_field]):
            raise UserError(_no_text(f"{path} record 1", text_field))
        yield from _columns(data.iter(batch_size=_BATCH_RECORDS), path, 1, text_field, report)
    except UserError:
        raise
    except Exception as error:  # of the library, the Hub or the network
        raise UserError(f"{path} cannot be read: {error}") from None


def _columns(batches: Iterable[Any], path: str, number: int, text_field: str, report: Report) -> Iterator[list[str]]:
    """Texts of Arrow batches or tables with a column ``text_field``, whose first record is ``number``."""
    import pyarrow as pa

    for batch in batches:
        if text_field not in batch.column_names:
            raise UserError(_no_text(f"{path} record {number}", text_field))
        column = batch.column(text_field)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise UserError(_no_text(f"{path} record {number}", text_field))
        texts, size = [], 0
        for value in column:
            stored, place = _stored(value), f"{path} record {number}"
            check_length(len(stored), place)
            text, defects = repaired(stored)
            report.count_repaired(dict.fromkeys(defects, place))
            texts.append(text)
            number, size = number + 1, size + len(stored)
            if size >= _BATCH_BYTES:
                yield texts
                texts, size = [], 0
        yield texts


def _stored(value: Any) -> bytes:
    """The bytes of an Arrow string, which may have been written without a look whether they are UTF-8."""
    if not value.is_valid:
        return b""
    value = getattr(value, "value", value)  # of an entry of a dictionary
    return bytes(value.as_buffer())


def _no_text(place: str, text_field: str) -> str:
    return f"{place} has no text in its field {text_field!r}: name the right one with --text_field"


_RECORD_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines, ".csv": _csv, ".parquet": _parquet}
_NO_RECORD = "{} is not JSON with a record a line: make a file of such lines by jq -c . or, where it is one array, by jq -c '.[]'"
