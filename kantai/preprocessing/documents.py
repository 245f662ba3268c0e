r"""Read documents from text, JSON lines, CSV, TSV, Parquet, archives and data sets of the Hub.

A document is a line, a paragraph, a file or a record. Defects are repaired and counted in a
:class:`Report`; nothing is lost silently. Bytes that are not UTF-8, halves of surrogate pairs and
NUL characters become U+FFFD. A file that has so many of them that it has another encoding is
refused (see :mod:`kantai.preprocessing.encodings`). Byte-order marks are removed, blank documents
are dropped, and lines end in ``\n`` or ``\r\n`` alone.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from tqdm import tqdm

from kantai.errors import UserError
from kantai.output import redact
from kantai.preprocessing import formats, parquet
from kantai.preprocessing.archives import members
from kantai.preprocessing.csv_rows import CsvRows
from kantai.preprocessing.encodings import Tally, refuse_foreign, refuse_foreign_beginning
from kantai.preprocessing.files import HUB, MIB, File, hub_dataset
from kantai.preprocessing.lines import (
    MAX_DOCUMENT_BYTES,
    Block,
    Report,
    check_length,
    read_lines,
    repaired,
)
from kantai.preprocessing.opening import open_file
from kantai.preprocessing.records import (
    MISSING,
    ON_ERROR,
    OnError,
    RecordOptions,
    joined,
    json_record,
    no_text,
    two_fields,
    value_in,
)
from kantai.preprocessing.spans import Piece, Span, cut

Unit = Literal["line", "paragraph", "file", "record"]
UNITS: tuple[Unit, ...] = get_args(Unit)


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
    file knows where a record begins. Archives are not split either.
    """
    format_suffix, compression = file.suffixes
    return not compression and format_suffix not in _WHOLE and unit != "file"


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
    piece: Piece,
    unit: Unit | None = None,
    text_field: str | Sequence[str] = "text",
    report: Report | None = None,
    on_error: OnError = "fail",
) -> Iterator[str]:
    """Yield the documents of a piece in order.

    However a file is cut into spans, the spans hold the documents of the whole file. A line belongs
    to the span that holds its first byte, and so does a row group of Parquet. Paragraphs are
    divided at the first blank line that begins at or after the cut.

    Args:
        piece: spans of ``.jsonl``, ``.ndjson``, ``.json``, ``.jsonlines`` and ``.jl`` files (one
            record a line), ``.csv`` and ``.tsv`` files (with a header line), ``.parquet`` files and
            data sets of the Hub, which all hold records. Every other file is text. ``.gz``,
            ``.xz``, ``.zst``, ``.bz2`` and ``.lz4`` are decompressed. ``.tar`` and ``.zip`` files
            stand for the files in them.
        unit: what one document is: a ``line``; a ``paragraph``, ended by a blank line, with its
            lines joined by a space, since their wrapping has no meaning; a whole ``file``; a
            ``record``. Default: lines of text, records of the others.
        text_field: the field or column of a record that holds its text, or several, joined by a
            blank line; ``a.b`` is field b of field a. Null is an empty document.
        report: receives the counts of what was read when the iteration ends.
        on_error: ``skip`` leaves out and counts records that are no JSON, do not fit the header, or
            lack the field.

    Raises:
        UserError: a file cannot be read to its end, has another format than its name says, or lacks
            the field; a document is longer than 256 MiB; all records of the piece are bad; a file
            that the piece holds whole, or the beginning of a large one, has another encoding than
            UTF-8. Whoever reads a file in parts judges it by the sum of the report's tallies.
    """
    read = Report()
    text_fields = (text_field,) if isinstance(text_field, str) else tuple(text_field)
    options = RecordOptions(text_fields, on_error)
    try:
        for span in _with_members(piece):
            _check_unit(span.file, unit)
            if not span.file.size:
                read.count("empty_files", span.file.path)
                continue
            for texts in _named_encoding(span, _reader(span, unit, options)(span, read), read):
                kept = [text for text in texts if text and not text.isspace()]
                read.documents += len(kept)
                read.empty += len(texts) - len(kept)
                read.characters += sum(map(len, kept))
                yield from kept
            if (span.start, span.stop) == (0, span.file.size):
                found = read.tallies.pop(redact(span.file.path), Tally())
                refuse_foreign(span.file, found)
        if read.skipped_records and not read.documents + read.empty:
            # The options are more likely to be wrong than each of so many records.
            raise UserError(
                f"all {read.skipped_records:,} records of a piece are bad: {options.first_error}"
            )
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
        help="text, .jsonl (.json, .ndjson, .jl), .csv, .tsv or .parquet files (also .gz, .xz, "
        ".zst, .bz2, .lz4, and in .tar or .zip), directories, quoted globs, URLs (s3://...), or "
        "hub:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--format",
        type=formats.format_argument,
        help="what the files are, whatever they are called: "
        f"{', '.join(formats.FORMATS)}, or one with its compression, as jsonl.gz",
    )
    parser.add_argument(
        "--document",
        choices=UNITS,
        help="unit of text that becomes one document (default: line for text, record for the rest)",
    )
    parser.add_argument(
        "--text_field",
        nargs="+",
        default=["text"],
        help="field of a record that holds its text (default text); a.b is field b of field a; "
        "the texts of several fields are joined by a blank line",
    )
    parser.add_argument(
        "--on_error",
        choices=ON_ERROR,
        default="fail",
        help="what to do about a record that is no JSON, does not fit the header or has no such "
        "field: fail, or skip it and count it (default fail)",
    )


def corpus_reader(arguments: argparse.Namespace) -> Callable[..., Iterator[str]]:
    """Return :func:`documents` with what the arguments say."""
    return partial(
        documents,
        unit=arguments.document,
        text_field=arguments.text_field,
        on_error=arguments.on_error,
    )


def with_progress_bar(texts: Iterable[str], total: int, description: str) -> Iterator[str]:
    """Pass texts on, and on a terminal show how many of about ``total`` characters are done."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


# Readers yield lists of texts: a list is filtered and counted much faster than text by text.
_Reader = Callable[[Span, Report], Iterator[Sequence[str]]]


def _with_members(piece: Piece) -> Iterator[Span]:
    """Yield spans, with the files in archives in the place of these."""
    for span in piece:
        if span.file.size and span.file.suffixes[0] in formats.ARCHIVES:
            is_empty = True
            for member in members(span.file):
                is_empty = False
                yield Span(member, 0, member.size)
            if is_empty:
                yield Span(replace(span.file, size=0), 0, 0)  # which is counted
        else:
            yield span


def _reader(span: Span, unit: Unit | None, options: RecordOptions) -> _Reader:
    if span.file.path.startswith(HUB):
        return partial(_hub_records, options)
    format_suffix = span.file.suffixes[0]
    if format_suffix in _RECORD_READERS:
        return partial(_RECORD_READERS[format_suffix], options)
    return {"paragraph": _paragraphs, "file": _whole_file}.get(unit or "line", _lines)


def _has_records(file: File) -> bool:
    return file.path.startswith(HUB) or file.suffixes[0] in _RECORD_READERS


def _check_unit(file: File, unit: Unit | None) -> None:
    if file.suffixes[0] in formats.ARCHIVES:
        return  # the files in it are looked at when they are read
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
    parts: list[str] = []  # of many lines, as empty ones would take nine bytes each
    defects: dict[str, str] = {}
    for block in _blocks(span, report):
        check_length(block.offset + len(block.raw), span.file.path)
        parts.append("\n".join(block.lines))
        for index in block.defects:
            defects = block.defects_at(index) | defects
    report.count_repaired(defects)
    yield ["\n".join(parts)]


def _json_lines(options: RecordOptions, span: Span, report: Report) -> Iterator[list[str]]:
    for block in _blocks_inside(span, report):
        texts = (_json_text(block, index, options, report) for index in range(len(block.lines)))
        yield [text for text in texts if text is not None]


def _json_text(block: Block, index: int, options: RecordOptions, report: Report) -> str | None:
    """Return the text of a line, or None for a bad one that is skipped."""
    line = block.lines[index]
    if not line or line.isspace():
        return ""
    try:
        record = json_record(line)
    except (ValueError, RecursionError):
        options.refuse(report, block.place(index), _NO_RECORD)
        return None
    texts: list[str] = []
    for name in options.text_fields:
        value = value_in(record, name)
        if value is MISSING or not isinstance(value, str | None):
            options.refuse(report, block.place(index), no_text(name))
            return None
        texts.append(value or "")
    text = joined(texts)
    defects = block.defects_at(index)
    if text and "\\u" in line:
        text, escaped = repaired(text)
        if escaped:
            place = block.place(index)
            defects |= dict.fromkeys(escaped, place)
            spoiled = Tally(0, 0, int("invalid_utf8" in escaped), int("nul" in escaped), place)
            report.add_tally(block.path, spoiled)
    report.count_repaired(defects)
    return text


def _csv_records(options: RecordOptions, span: Span, report: Report) -> Iterator[list[str]]:
    defects: dict[str, str] = {}  # of the lines read since the last record
    length = 0  # of these lines

    def lines() -> Iterator[str]:
        nonlocal length
        for line, block, index in _each_line(_blocks(span, report)):
            defects.update(block.defects_at(index) | defects)
            length += len(line)
            check_length(length, block.place(index))
            yield line + "\n"

    is_tsv = span.file.suffixes[0] == ".tsv"
    rows = CsvRows(lines(), span.file.path, options.text_fields, is_tsv=is_tsv)
    columns: list[int] = []
    for row in rows:
        for name in options.text_fields[len(columns) :]:
            if name not in rows.header:
                raise UserError(f"{span.file.path} record 1 {no_text(name)}")
            if rows.header.count(name) > 1:
                raise UserError(f"{span.file.path} {two_fields(name)}")
            columns.append(rows.header.index(name))
        misfit = rows.misfit(row)
        if misfit:
            options.refuse(report, row.place, misfit)
        else:
            report.count_repaired(defects)
            yield [joined([row.values[column] for column in columns]) if row.values else ""]
        defects.clear()
        length = 0


def _hub_records(options: RecordOptions, span: Span, report: Report) -> Iterator[list[str]]:
    path = f"{span.file.path} shard {span.start}"
    try:
        data = hub_dataset(span.file.path)
        data = data.shard(num_shards=span.file.size, index=span.start).with_format("arrow")
        batches = data.iter(batch_size=parquet.BATCH_RECORDS)
        yield from parquet.column_texts(
            batches, span.file, path, 1, text_fields=options.text_fields, report=report
        )
    except UserError:
        raise
    except Exception as error:  # from the library, the Hub or the network
        raise UserError(f"{path} cannot be read: {error}") from None


def _parquet_records(options: RecordOptions, span: Span, report: Report) -> Iterator[list[str]]:
    return parquet.read_texts(span, options.text_fields, report)


_RECORD_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".jsonlines": _json_lines,
    ".jl": _json_lines,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
}
_WHOLE = (".csv", ".tsv", *formats.ARCHIVES)  # cannot be read from the middle
_NO_RECORD = (
    "is not JSON with a record a line: make a file of such lines by jq -c . or, "
    "where it is one array, by jq -c '.[]'"
)
