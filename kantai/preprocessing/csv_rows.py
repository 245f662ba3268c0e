"""Read CSV and TSV row by row, and refuse rows that their header does not fit."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kantai.errors import UserError
from kantai.preprocessing.lines import MAX_DOCUMENT_BYTES

_DELIMITERS = ",;\t|"


@dataclass
class Row:
    """A row behind the header.

    Attributes:
        values: its fields; none for a blank line.
        place: for messages.
    """

    values: list[str]
    place: str


class CsvRows:
    """The rows of a CSV file (fields may be quoted) or of a TSV file (quotes are characters).

    The delimiter of CSV is the first of comma, semicolon, tab and bar by which the header has the
    wanted fields.

    Args:
        lines: with their line ends.
        path: for messages.
        wanted: the fields that the header should have.
        is_tsv: whether fields are parted by tabs, and quotes mean nothing.
    """

    def __init__(
        self, lines: Iterator[str], path: str, wanted: Sequence[str], *, is_tsv: bool
    ) -> None:
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        first = list(itertools.islice(lines, 1))
        self._path = path
        self._is_tsv = is_tsv
        settings: dict[str, Any] = {"delimiter": _delimiter(first, wanted)}
        if is_tsv:
            settings = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        self._reader = csv.reader(itertools.chain(first, lines), strict=True, **settings)
        self.header = self._next(0) or []

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows behind the header.

        Raises:
            UserError: the file is not CSV; a TSV file has quoted fields.
        """
        for number in itertools.count(1):
            begin = self._reader.line_num + 1
            values = self._next(number)
            if values is None:
                return
            if self._is_tsv and any(map(_is_quoted, values)):
                raise UserError(
                    f"{self._path} line {begin} has a quoted field, which .tsv files do not have: "
                    "give --format csv, which reads tabs and quotes"
                )
            yield Row(values, f"{self._path} record {number} (line {begin})")

    def misfit(self, row: Row) -> str:
        """Say what is wrong with the width of a row, as the rest of a sentence; "" if nothing."""
        width = len(row.values)
        if width == len(self.header) or not row.values:
            return ""
        delimiter = self._reader.dialect.delimiter
        advice = "quote fields that hold it" if width > len(self.header) else "mend the row"
        return (
            f"has {width} fields parted by {delimiter!r}, but the header has {len(self.header)}: "
            f"{advice}, give --format text if a line is a text, or skip such rows with "
            "--on_error skip"
        )

    def _next(self, number: int) -> list[str] | None:
        begin = self._reader.line_num + 1
        try:
            return next(self._reader, None)
        except csv.Error as error:
            place = f"record {number}" if number else "its header"
            lines = f"lines {begin} to {self._reader.line_num}"
            if begin >= self._reader.line_num:
                lines = f"line {begin}"
            raise UserError(f"{self._path} is not CSV at {place} ({lines}): {error}") from None


def _delimiter(first: list[str], wanted: Sequence[str]) -> str:
    for delimiter in _DELIMITERS:
        try:
            header = next(csv.reader(first, delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if set(wanted) <= set(header):
            return delimiter
    return _DELIMITERS[0]


def _is_quoted(value: str) -> bool:
    """Tell whether a writer of CSV quoted a field because there are quotes in it."""
    if not (len(value) > 3 and value[0] == value[-1] == '"'):
        return False
    inside = value[1:-1]
    return '""' in inside and '"' not in inside.replace('""', "")
