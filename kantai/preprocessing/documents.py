r"""Read documents from text, JSON lines, CSV, Parquet and data sets of the Hub.

A document is a line, a paragraph, a file or a record. Defects are repaired and counted in a
:class:`Report`; nothing is lost silently. Bytes that are not UTF-8, halves of surrogate pairs and
NUL characters become U+FFFD. A file that has so many of them that it has another encoding is
refused (see :mod:`kantai.preprocessing.encodings`). Byte-order marks are removed, blank documents
are dropped, and lines end in ``\n`` or ``\r\n`` alone.
"""

import argparse
import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

from tqdm import tqdm

from kantai.errors import UserError
from kantai.output import redact
from kantai.preprocessing.encodings import (
    Tally,
    refuse_foreign,
    refuse_foreign_beginning,
    tally,
)
from kantai.preprocessing.files import HUB, MIB, File, Piece, Span, cut, hub_dataset, open_file
from kantai.preprocessing.lines import (
    MAX_DOCUMENT_BYTES,
    Block,
    Report,
    check_length,
    read_lines,
    repaired,
)

Unit = Literal["line", "paragraph", "file", "record"]
UNITS: tuple[Unit, ...] = get_args(Unit)
# Records are read in batches of at most this many texts, and given out by this many bytes.
_BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 22


def pieces(
    files: Iterable[File], unit: Unit | None = None, piece_bytes: int | None = None
) -> list[Piece]:
    """Cut files into pieces that can be read alone, of the sizes that :func:`.files.cut` gives.

    Raises:
        UserError: a file cannot be cut into such documents.
    """
    files = list(files)
    for file in files:
        _check_unit(file, unit)
    return cut(files, splittable=lambda file: splittable(file, unit), piece_bytes=piece_bytes)


def splittable(file: File, unit: Unit | None) -> bool:
    """Tell whether spans of a file can be read alone.

    Uncompressed text and JSON lines are split at their lines, Parquet at its row groups. CSV is
    not: a quoted field may hold line ends, so only a reader that starts at the beginning of the
    file knows where a record begins.
    """
    format_suffix, compression = file.suffixes
    return not compression and format_suffix != ".csv" and unit != "file"


def has_paragraphs(file: File) -> bool:
    """Tell whether text has blank lines that end its paragraphs, by its first MiB.

    Blank lines here and there are no ends of paragraphs: text has none if it would have fewer than
    ten, or if they would have more than a hundred lines on average.
    """
    if _has_records(file):
        return False
    with open_file(file) as content:
        blocks = read_lines(content, file.path, 0, MIB, Report())
        inside = itertools.takewhile(lambda block: block.inside, blocks)
        lines = [line for block in inside for line in block.lines]
    blank = sum(1 for line in lines if not line or line.isspace())
    return blank >= 10 and len(lines) <= 100 * blank


def documents(
    piece: Piece, unit: Unit | None = None, text_field: str = "text", report: Report | None = None
) -> Iterator[str]:
    """Yield the documents of a piece in order.

    However a file is cut into spans, the spans hold the documents of the whole file. A line belongs
    to the span that holds its first byte, and so does a row group of Parquet. Paragraphs are
    divided at the first blank line that begins at or after the cut.

    Args:
        piece: spans of ``.jsonl``, ``.ndjson`` and ``.json`` files (one record a line), ``.csv``
            files (with a header line), ``.parquet`` files and data sets of the Hub, which all hold
            records. Every other file is text. ``.gz``, ``.xz`` and ``.zst`` are decompressed.
        unit: what one document is: a ``line``; a ``paragraph``, ended by a blank line, with its
            lines joined by a space, since their wrapping has no meaning; a whole ``file``; a
            ``record``. Default: lines of text, records of the others.
        text_field: the field or column of a record that holds its text; null is an empty document.
        report: receives the counts of what was read when the iteration ends.

    Raises:
        UserError: a file cannot be read to its end, has another format than its name says, or lacks
            the field; a document is longer than 256 MiB; a file that the piece holds whole, or the
            beginning of a large one, has another encoding than UTF-8. Whoever reads a file in
            parts judges it by the sum of the report's tallies.
    """
    read = Report()
    try:
        for span in piece:
            _check_unit(span.file, unit)
            if not span.file.size:
                read.count("empty_files", span.file.path)
                continue
            for texts in _named_encoding(span, _reader(span, unit, text_field)(span, read), read):
                kept = [text for text in texts if text and not text.isspace()]
                read.documents += len(kept)
                read.empty += len(texts) - len(kept)
                read.characters += sum(map(len, kept))
                yield from kept
            if (span.start, span.stop) == (0, span.file.size):
                found = read.tallies.pop(redact(span.file.path), Tally())
                refuse_foreign(span.file, found)
    finally:
        if report is not None:
            report.merge(read)


def _named_encoding(
    span: Span, texts: Iterator[Sequence[str]], report: Report
) -> Iterator[Sequence[str]]:
    """Pass texts on; where a parser stumbles over text of another encoding, say that it is one."""
    try:
        yield from texts
    except UserError:
        refuse_foreign(span.file, report.tallies.get(redact(span.file.path), Tally()))
        raise


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a corpus; see :func:`documents`."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="text, .jsonl (.json, .ndjson), .csv or .parquet files (also .gz, .xz, .zst), "
        "directories, quoted globs, URLs (s3://...), or hub:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--document",
        choices=UNITS,
        help="unit of text that becomes one document (default: line for text, record for the rest)",
    )
    parser.add_argument(
        "--text_field", default="text", help="field of a record that holds its text (default text)"
    )


def with_progress_bar(texts: Iterable[str], total: int, description: str) -> Iterator[str]:
    """Pass texts on, and on a terminal show how many of about ``total`` characters are done."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


# Readers yield lists of texts: a list is filtered and counted much faster than text by text.
_Reader = Callable[[Span, Report], Iterator[Sequence[str]]]


def _reader(span: Span, unit: Unit | None, text_field: str) -> _Reader:
    if span.file.path.startswith(HUB):
        return partial(_hub_records, text_field)
    format_suffix = span.file.suffixes[0]
    if format_suffix in _RECORD_READERS:
        return partial(_RECORD_READERS[format_suffix], text_field)
    return {"paragraph": _paragraphs, "file": _whole_file}.get(unit or "line", _lines)


def _has_records(file: File) -> bool:
    return file.path.startswith(HUB) or file.suffixes[0] in _RECORD_READERS


def _check_unit(file: File, unit: Unit | None) -> None:
    has_records = _has_records(file)
    if unit is not None and has_records != (unit == "record"):
        units = "record" if has_records else "line, paragraph or file"
        raise UserError(f"{file.path} cannot be cut by --document {unit}: give {units}")


def _blocks(span: Span, report: Report) -> Iterator[Block]:
    """Yield the lines of a span in blocks, then those behind it (see :func:`read_lines`)."""
    if span.start >= span.stop:
        return
    # Only the end of the file will do for a compressed one: its size says nothing about its text.
    stop = None if span.stop == span.file.size else span.stop
    if span.start == 0:
        refuse_foreign_beginning(span.file)
    with open_file(span.file, max(span.start - 1, 0)) as content:
        yield from read_lines(content, span.file.path, span.start, stop, report)


def _blocks_inside(span: Span, report: Report) -> Iterator[Block]:
    """Yield the lines that begin inside a span, in blocks."""
    return itertools.takewhile(lambda block: block.inside, _blocks(span, report))


def _each_line(blocks: Iterable[Block]) -> Iterator[tuple[str, Block, int]]:
    """Yield every line with its block, and its index in it."""
    for block in blocks:
        for index, line in enumerate(block.lines):
            yield line, block, index


def _lines(span: Span, report: Report) -> Iterator[list[str]]:
    for block in _blocks_inside(span, report):
        for index in block.defects:
            report.count_repaired(block.defects_at(index))
        yield block.lines


def _paragraphs(span: Span, report: Report) -> Iterator[list[str]]:
    """Yield paragraphs from the first blank line of a span to the first blank line behind it."""
    lines = _each_line(_blocks(span, report))
    if span.start > 0 and not _skip_partial_paragraph(lines):
        return
    paragraph: list[str] = []
    length = 0
    defects: dict[str, str] = {}
    for line, block, index in lines:
        text = line.strip()
        if text:
            paragraph.append(text)
            length += len(line)
            if length > MAX_DOCUMENT_BYTES:
                check_length(length, block.place(index))
            if block.defects:
                defects = block.defects_at(index) | defects
            continue
        if paragraph:
            report.count_repaired(defects)
            yield [" ".join(paragraph)]
            paragraph = []
            length = 0
            defects = {}
        if not block.inside:
            return
    if paragraph:
        report.count_repaired(defects)
        yield [" ".join(paragraph)]


def _skip_partial_paragraph(lines: Iterator[tuple[str, Block, int]]) -> bool:
    """Read past the first blank line; return False if there is none inside the span."""
    for line, block, _ in lines:
        if not block.inside:
            return False
        if not line or line.isspace():
            return True
    return False


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


def _json_lines(text_field: str, span: Span, report: Report) -> Iterator[list[str]]:
    for block in _blocks_inside(span, report):
        yield [_json_text(block, index, text_field, report) for index in range(len(block.lines))]


def _json_text(block: Block, index: int, text_field: str, report: Report) -> str:
    line = block.lines[index]
    if not line or line.isspace():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(_NO_RECORD.format(block.place(index)))
    text = record.get(text_field, 0)
    if not isinstance(text, str | None):
        raise UserError(_no_text(block.place(index), text_field))
    defects = block.defects_at(index)
    if text and "\\u" in line:
        text, escaped = repaired(text)
        if escaped:
            place = block.place(index)
            defects |= dict.fromkeys(escaped, place)
            spoiled = Tally(0, 0, int("invalid_utf8" in escaped), int("nul" in escaped), place)
            report.add_tally(block.path, spoiled)
    report.count_repaired(defects)
    return text or ""


def _csv_records(text_field: str, span: Span, report: Report) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    defects: dict[str, str] = {}  # of the lines read since the last record

    def lines() -> Iterator[str]:
        for line, block, index in _each_line(_blocks(span, report)):
            defects.update(block.defects_at(index) | defects)
            yield line + "\n"

    rows = csv.reader(lines(), strict=True)  # DictReader would drop blank rows silently
    try:
        names = next(rows, [])
        for row in rows:
            if text_field not in names:
                raise UserError(_no_text(f"{span.file.path} record 1", text_field))
            column = names.index(text_field)
            report.count_repaired(defects)
            defects.clear()
            yield row[column : column + 1] or [""]
    except csv.Error as error:
        raise UserError(f"{span.file.path} is not CSV: {error}") from None


def _parquet_records(text_field: str, span: Span, report: Report) -> Iterator[list[str]]:
    import pyarrow as pa  # imported here: it takes a second that text need not wait for
    import pyarrow.parquet as pq

    path = span.file.path
    try:
        # With a buffer, pyarrow reads a column by pages (Arrow writes pages of a MiB or 1,024
        # records) and not whole.
        with (
            open_file(span.file) as content,
            pq.ParquetFile(content, buffer_size=MIB, pre_buffer=False) as file,
        ):
            if text_field not in file.schema_arrow.names:
                raise UserError(_no_text(f"{path} record 1", text_field))
            number = 1
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                if span.start <= _first_byte(group) < span.stop:
                    batches = file.iter_batches(
                        _batch_records(group, text_field), [index], [text_field]
                    )
                    yield from _column_texts(
                        batches, span.file, path, number, text_field=text_field, report=report
                    )
                number += group.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _first_byte(group: Any) -> int:
    """Return the offset of a row group in its Parquet file."""
    column = group.column(0)
    if column.has_dictionary_page:
        return int(column.dictionary_page_offset)
    return int(column.data_page_offset)


def _batch_records(group: Any, text_field: str) -> int:
    """Return how many records of a row group to read at once."""
    columns = (group.column(index) for index in range(group.num_columns))
    stored = sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema == text_field
    )
    records: int = _BATCH_BYTES * group.num_rows // max(1, stored)
    return max(1, min(_BATCH_RECORDS, records))


def _hub_records(text_field: str, span: Span, report: Report) -> Iterator[list[str]]:
    path = f"{span.file.path} shard {span.start}"
    try:
        data = hub_dataset(span.file.path)
        data = data.shard(num_shards=span.file.size, index=span.start).with_format("arrow")
        if text_field not in (data.column_names or [text_field]):
            raise UserError(_no_text(f"{path} record 1", text_field))
        batches = data.iter(batch_size=_BATCH_RECORDS)
        yield from _column_texts(batches, span.file, path, 1, text_field=text_field, report=report)
    except UserError:
        raise
    except Exception as error:  # from the library, the Hub or the network
        raise UserError(f"{path} cannot be read: {error}") from None


def _column_texts(
    batches: Iterable[Any], file: File, path: str, number: int, *, text_field: str, report: Report
) -> Iterator[list[str]]:
    """Yield the texts of Arrow batches or tables; ``number`` is that of the first record."""
    for batch in batches:
        if text_field not in batch.column_names or not _is_text(batch.column(text_field).type):
            raise UserError(_no_text(f"{path} record {number}", text_field))
        texts: list[str] = []
        found = Tally()
        size = 0
        for value in batch.column(text_field):
            place = f"{path} record {number}"
            stored = _stored(value)
            check_length(len(stored), place)
            text, defects = repaired(stored)
            report.count_repaired(dict.fromkeys(defects, place))
            if defects:
                found.add(dataclasses.replace(tally(stored, text), first=place))
            else:
                found.add(Tally(len(stored), len(stored) - len(text)))
            texts.append(text)
            number += 1
            size += len(stored)
            if size >= _BATCH_BYTES:
                yield texts
                texts = []
                size = 0
        report.add_tally(file.path, found)
        yield texts


def _is_text(arrow_type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return arrow_type in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _stored(value: Any) -> bytes:
    """Return the bytes of an Arrow string, which its writer may not have checked to be UTF-8."""
    if not value.is_valid:
        return b""
    value = getattr(value, "value", value)  # a dictionary-encoded string holds it inside
    return bytes(value.as_buffer())


def _no_text(place: str, text_field: str) -> str:
    return f"{place} has no text in its field {text_field!r}: name the right one with --text_field"


_RECORD_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
_NO_RECORD = (
    "{} is not JSON with a record a line: make a file of such lines by jq -c . or, "
    "where it is one array, by jq -c '.[]'"
)
