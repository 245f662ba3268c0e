"""Read the texts of Parquet row groups and of Arrow tables, in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from kantai.errors import UserError
from kantai.preprocessing.encodings import Tally, tally
from kantai.preprocessing.files import MIB, File
from kantai.preprocessing.lines import Report, check_length, repaired
from kantai.preprocessing.opening import open_file, seekable
from kantai.preprocessing.records import joined, no_text, two_fields
from kantai.preprocessing.spans import Span

# Records are read in batches of at most this many texts, and given out by this many bytes.
BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 22
_EXPANDED_BYTES = 1 << 26  # of a batch whose texts share stored bytes
_MAX_CHUNK_BYTES = 1 << 30  # of a column chunk that was compressed more than any text is
_MAX_RATIO = 1000


def read_texts(span: Span, text_fields: Sequence[str], report: Report) -> Iterator[list[str]]:
    """Yield the texts of the row groups that begin inside a span of a Parquet file.

    Raises:
        UserError: the file is not readable, or lacks a field.
    """
    import pyarrow as pa  # imported here: it takes a second that text need not wait for
    import pyarrow.parquet as pq

    path = span.file.path
    try:
        # With a buffer, pyarrow reads a column by pages (Arrow writes pages of a MiB or 1,024
        # records) and not whole.
        with (
            open_file(span.file) as stored,
            seekable(stored) as content,
            pq.ParquetFile(content, buffer_size=MIB, pre_buffer=False) as file,
        ):
            for name in text_fields:
                if not _has_field(file.schema_arrow, name):
                    raise UserError(f"{path} record 1 {no_text(name)}")
                if file.schema_arrow.names.count(name) > 1:
                    raise UserError(f"{path} {two_fields(name)}")
            number = 1
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                if span.start <= _first_byte(group) < span.stop:
                    rows = _batch_records(path, content, group, text_fields)
                    batches = file.iter_batches(rows, [index], list(text_fields))
                    yield from column_texts(
                        batches, span.file, path, number, text_fields=text_fields, report=report
                    )
                number += group.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def column_texts(
    batches: Iterable[Any],
    file: File,
    path: str,
    number: int,
    *,
    text_fields: Sequence[str],
    report: Report,
) -> Iterator[list[str]]:
    """Yield the texts of Arrow batches or tables; ``number`` is that of the first record."""
    for batch in batches:
        columns = []
        for name in text_fields:
            column = _column(batch, name)
            if column is None or not _is_text(column.type):
                raise UserError(f"{path} record {number} {no_text(name)}")
            columns.append(column)
        texts: list[str] = []
        found = Tally()
        size = 0
        for values in zip(*columns, strict=True):
            place = f"{path} record {number}"
            length = sum(map(_length, values))
            check_length(length, place)
            parts = [_repaired(_stored(value), place, found) for value in values]
            report.count_repaired({kind: place for _, kinds in parts for kind in kinds})
            texts.append(joined([text for text, _ in parts]))
            number += 1
            size += length
            if size >= _BATCH_BYTES:
                yield texts
                texts = []
                size = 0
        report.add_tally(file.path, found)
        yield texts


def _repaired(stored: bytes, place: str, found: Tally) -> tuple[str, tuple[str, ...]]:
    """Repair a text, and tally it; see :func:`kantai.preprocessing.lines.repaired`."""
    text, defects = repaired(stored)
    if defects:
        found.include(replace(tally(stored, text), first=place))
    else:
        found.include(Tally(len(stored), len(stored) - len(text)))
    return text, defects


def _has_field(schema: Any, name: str) -> bool:
    if name in schema.names:
        return True
    first, *rest = name.split(".")
    if first not in schema.names:
        return False
    arrow_type = schema.field(first).type
    for key in rest:
        index = arrow_type.get_field_index(key) if hasattr(arrow_type, "get_field_index") else -1
        if index < 0:
            return False
        arrow_type = arrow_type.field(index).type
    return True


def _column(batch: Any, name: str) -> Any:
    """Return a column, or a field inside of a column of structs; None if it is missing."""
    import pyarrow.compute as pc

    if name in batch.column_names:
        return batch.column(name)
    if not _has_field(batch.schema, name):
        return None
    first, *rest = name.split(".")
    return pc.struct_field(batch.column(first), rest)


def _first_byte(group: Any) -> int:
    """Return the offset of a row group in its Parquet file."""
    column = group.column(0)
    if column.has_dictionary_page:
        return int(column.dictionary_page_offset)
    return int(column.data_page_offset)


def _batch_records(path: str, content: BinaryIO, group: Any, text_fields: Sequence[str]) -> int:
    """Return how many records of a row group to read at once.

    A few stored bytes can hold much text: a row may be the number of a text in a dictionary, or
    have its beginning from the row before. So 64 rows of a file of 20 KB took 3.2 GB.
    """
    columns = [
        column
        for column in (group.column(index) for index in range(group.num_columns))
        if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in text_fields)
    ]
    stored = sum(column.total_uncompressed_size for column in columns)
    compressed = sum(column.total_compressed_size for column in columns)
    if stored > max(_MAX_CHUNK_BYTES, _MAX_RATIO * compressed):
        raise UserError(
            f"{path} has {stored >> 20:,} MiB of text in a row group of {compressed:,} bytes, "
            "which would fill the memory: is it damaged? write it again with smaller row groups"
        )
    longest = sum(_longest_shared(content, column) for column in columns)
    records: int = _BATCH_BYTES * group.num_rows // max(1, stored)
    return max(1, min(BATCH_RECORDS, records, _EXPANDED_BYTES // max(1, longest)))


def _longest_shared(content: BinaryIO, column: Any) -> int:
    """Return the most bytes that one text of a column chunk can share with another."""
    stored = int(column.total_uncompressed_size)
    if "DELTA_BYTE_ARRAY" in column.encodings:
        return stored
    if not column.has_dictionary_page:
        return 0
    content.seek(column.dictionary_page_offset)
    return _page_bytes(content.read(16)) or stored


def _page_bytes(header: bytes) -> int:
    """Return the uncompressed size in a Parquet page header; 0 if it has another form.

    The header is Thrift's compact protocol: field 1 is the page's type and field 2 its size, both
    32-bit numbers in zigzag varints.
    """
    if len(header) < 8 or header[0] != 0x15 or header[2] != 0x15:
        return 0
    number = 0
    for index, byte in enumerate(header[3:8]):
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number >> 1
    return 0


def _is_text(arrow_type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return arrow_type in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _length(value: Any) -> int:
    return len(_buffer(value)) if value.is_valid else 0


def _stored(value: Any) -> bytes:
    """Return the bytes of an Arrow string, which its writer may not have checked to be UTF-8."""
    return bytes(_buffer(value)) if value.is_valid else b""


def _buffer(value: Any) -> Any:
    value = getattr(value, "value", value)  # a dictionary-encoded string holds it inside
    return value.as_buffer()
