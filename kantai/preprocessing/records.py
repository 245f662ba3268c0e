"""The text of a record: its fields, and what is done about a bad one."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kantai.errors import UserError
from kantai.preprocessing.lines import Report

OnError = Literal["fail", "skip"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
MISSING = object()
# Longer lines are looked at before they are parsed: 256 MiB of "[]," would become 6 GB of lists.
_LONG_LINE = 1 << 24
_MAX_VALUES = 1 << 23
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')


@dataclass
class RecordOptions:
    """How the text of a record is found.

    Attributes:
        text_fields: the fields that hold it, joined by a blank line; ``a.b`` is field b of field a.
        on_error: whether to refuse a bad record, or to leave it out and count it.
        first_error: what was wrong with the first one that was left out, and where.
    """

    text_fields: tuple[str, ...]
    on_error: OnError = "fail"
    first_error: str = ""

    def refuse(self, report: Report, place: str, what: str) -> None:
        """Refuse or count a bad record.

        Args:
            place: of the record.
            what: is wrong with it, as the rest of a sentence about the place.
        """
        if self.on_error == "fail":
            raise UserError(f"{place} {what}")
        self.first_error = self.first_error or f"{place} {what}"
        report.count("skipped_records", place)


def json_record(line: str) -> dict[str, Any]:
    """Parse a line of JSON lines.

    Raises:
        ValueError: it is not an object, or has more than eight million values.
        RecursionError: it is nested too deeply.
    """
    if len(line) > _LONG_LINE:
        bare = _STRING.sub('""', line)
        if sum(map(bare.count, ',[{"')) > _MAX_VALUES:
            raise ValueError("too many values")
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no object")
    return record


def value_in(record: dict[str, Any], name: str) -> Any:
    """Return a field of a record, null below a null, or ``MISSING``.

    A field whose own name has dots comes before one inside of others.
    """
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def joined(texts: Sequence[str]) -> str:
    """Join the texts of several fields by a blank line; blank ones are left out."""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(text for text in texts if text and not text.isspace())


def two_fields(text_field: str) -> str:
    """Say that a field is there twice, as the rest of a sentence."""
    return f"has two fields called {text_field!r}: rename or remove one"


def no_text(text_field: str) -> str:
    """Say that a field is no text, as the rest of a sentence."""
    return f"has no text in its field {text_field!r}: name the right one with --text_field"
