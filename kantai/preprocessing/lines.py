"""Which lines does a part of a file have, and what had to be repaired in them?"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import BinaryIO

from kantai.errors import UserError

MAX_DOCUMENT_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 18  # the text of a block stays in the processor's cache
_TAIL_BYTES = 1 << 16  # read at a time where only the rest of a line or paragraph is wanted
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass
class Report:
    """What was read. Reports of disjoint spans add up; ``dataclasses.asdict`` makes it JSON.

    Attributes:
        documents: given out.
        characters: in those.
        empty: empty or blank lines (of text cut into lines), files and records, left out.
        empty_files: files of no byte.
        replaced: documents in which something became U+FFFD, for either of the next two reasons.
        invalid_utf8: documents with bytes that are not UTF-8, or with half a surrogate pair.
        nul: documents with NUL characters.
        byte_order_marks: files that began with one.
        windows_line_ends: lines that ended in ``\\r\\n``.
        first: where each of the last six was first met, by its name.
    """

    documents: int = 0
    characters: int = 0
    empty: int = 0
    empty_files: int = 0
    replaced: int = 0
    invalid_utf8: int = 0
    nul: int = 0
    byte_order_marks: int = 0
    windows_line_ends: int = 0
    first: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Take in the report of what was read next."""
        for name in (f.name for f in fields(self) if f.name != "first"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first = other.first | self.first

    def count(self, name: str, place: str, times: int = 1) -> None:
        """Count something that has a place."""
        setattr(self, name, getattr(self, name) + times)
        self.first.setdefault(name, place)

    def count_repaired(self, defects: dict[str, str]) -> None:
        """Count a document whose defects, and the places of these, are given."""
        for defect, place in defects.items():
            self.count(defect, place)
        if defects:
            self.count("replaced", next(iter(defects.values())))

    def notes(self) -> list[str]:
        """A sentence for everything that somebody may want to put right."""
        sentences = {
            "empty_files": "{} files are empty",
            "invalid_utf8": "{} documents had bytes that are not UTF-8, replaced by U+FFFD",
            "nul": "{} documents had NUL characters, replaced by U+FFFD",
        }
        return [
            f"{sentence.format(f'{number:,}')} (first: {self.first[name]})"
            for name, sentence in sentences.items()
            if (number := getattr(self, name))
        ]


@dataclass(slots=True)
class Block:
    """Some consecutive lines."""

    path: str
    raw: bytes  # as stored, with their ends
    offset: int  # of the first byte
    number: int  # of the first line, from 1; 0: not known
    inside: bool  # before the first line that begins behind the span
    lines: list[str]  # without their ends
    defects: dict[int, tuple[str, ...]]  # of the lines that had to be repaired, by index

    def defects_at(self, index: int) -> dict[str, str]:
        """What was wrong with a line, and where it is."""
        return dict.fromkeys(self.defects[index], self.place(index)) if index in self.defects else {}

    def place(self, index: int) -> str:
        if self.number:
            return f"{self.path} line {self.number + index}"
        before = self.raw.split(b"\n")[:index]
        return f"{self.path} line at byte {self.offset + sum(map(len, before)) + index}"


def check_length(length: int, place: str) -> None:
    if length > MAX_DOCUMENT_BYTES:
        raise UserError(f"{place}: a document longer than 256 MiB; is it text? break it into lines")


def repaired(text: str | bytes) -> tuple[str, tuple[str, ...]]:
    """Text as it may be given out, and what was wrong with it."""
    defects: tuple[str, ...] = ()
    if isinstance(text, bytes):
        stored = text
        try:
            text = stored.decode()
        except UnicodeDecodeError:
            text, defects = stored.decode(errors="replace"), ("invalid_utf8",)
    elif not text.isascii() and _HALF_PAIR.search(text):
        text, defects = _HALF_PAIR.sub("\ufffd", text), ("invalid_utf8",)
    if "\0" in text:
        text, defects = text.replace("\0", "\ufffd"), (*defects, "nul")
    return text, defects


def read_lines(content: BinaryIO, path: str, start: int, stop: int | None, report: Report) -> Iterator[Block]:
    """The lines that begin from byte ``start`` to before ``stop``, in blocks, and then those behind for as long as they are asked for.

    Args:
        content: opened at ``max(start - 1, 0)``: what is there tells whether a line begins at ``start``.
        path: for messages.
        stop: None: the end of the content.

    Raises:
        UserError: the content cannot be read to its end, or a line is longer than 256 MiB.
    """
    number = 0 if start else 1
    for raw, offset, inside in _raw_blocks(content, path, start, stop):
        text = raw
        if offset == 0 and raw.startswith(_BYTE_ORDER_MARK):
            report.count("byte_order_marks", path)
            text = raw[len(_BYTE_ORDER_MARK) :]
        if b"\r" in raw:
            if inside and (ends := raw.count(b"\r\n")):
                report.count("windows_line_ends", path, ends)
            text = text.replace(b"\r\n", b"\n")
        text = text.removesuffix(b"\n")
        defects = {}
        try:
            if b"\0" in text:
                raise ValueError
            lines = text.decode().split("\n")
        except ValueError:  # also what invalid UTF-8 raises
            pairs = [repaired(line) for line in text.split(b"\n")]
            lines = [line for line, _ in pairs]
            defects = {index: of_line for index, (_, of_line) in enumerate(pairs) if of_line}
        yield Block(path, raw, offset, number, inside, lines, defects)
        number += len(lines) if number else 0


def _raw_blocks(content: BinaryIO, path: str, start: int, stop: int | None) -> Iterator[tuple[bytes, int, bool]]:
    """Yield (whole lines, offset of their first byte, whether they begin before ``stop``).

    The last of these is the line whose end is the first at or after byte ``stop - 1``; the first begins behind the one whose end is the
    first at or after ``start - 1``. A line too long is refused before it fills the memory.
    """
    position = begin = max(start - 1, 0)  # of what is read next, and of the next line
    in_the_one_before, inside = start > 0, True
    pending: list[bytes] = []
    length = 0  # of what is pending
    while data := _read(content, path, position, None if stop is None else stop - 1 - position):
        at_stop = inside and stop is not None and position >= stop - 1
        position += len(data)
        if in_the_one_before:
            if at_stop:
                return
            if not (end := data.find(b"\n") + 1):
                continue
            in_the_one_before = False
            begin, data = position - len(data) + end, data[end:]
        end = (data.find(b"\n") if at_stop else data.rfind(b"\n")) + 1
        if end:
            raw = b"".join((*pending, data[:end]))
            yield raw, begin, inside
            begin += len(raw)
            inside = inside and not at_stop
            pending, length = [], 0
        pending.append(data[end:])
        length += len(data) - end
        check_length(length, f"{path} line at byte {begin}")
    if raw := b"".join(pending):
        yield raw, begin, inside


def _read(content: BinaryIO, path: str, position: int, left: int | None) -> bytes:
    """A block that does not pass ``left`` bytes; None: there is no bound; 0 or less: only the end of a line is wanted."""
    size = _BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left) if left > 0 else _TAIL_BYTES
    try:
        return content.read(size)
    except Exception as error:  # each decompressor, file system and network has its own
        reason = "it is damaged, cut off or out of reach"
        raise UserError(f"{path} cannot be read beyond byte {position} of its text, {reason}: {error}") from None
