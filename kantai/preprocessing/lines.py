"""Read the lines of a part of a file, and repair and count what is wrong in them."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, BinaryIO

from kantai.errors import UserError
from kantai.output import redact
from kantai.preprocessing.encodings import Tally, refuse_mark, tally
from kantai.storage import network

MAX_DOCUMENT_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 18  # the text of a block stays in the processor's cache
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass
class Report:
    """Counts of what was read.

    Reports of disjoint spans can be merged; ``dataclasses.asdict`` makes a report JSON.
    """

    documents: int = 0  # given out
    characters: int = 0  # in these documents
    empty: int = 0  # empty or blank lines (of text cut into lines), files and records, all left out
    empty_files: int = 0  # of 0 bytes
    replaced: int = 0  # documents in which U+FFFD stands for one of the next two
    invalid_utf8: int = 0  # documents with bytes that are not UTF-8, or with half a surrogate pair
    nul: int = 0  # documents with NUL characters
    byte_order_marks: int = 0  # files that began with one
    windows_line_ends: int = 0  # lines that ended in \r\n
    skipped_records: int = 0  # bad records that were left out by choice
    # Where each of the last seven was first met.
    first: dict[str, str] = field(default_factory=dict)
    # Of files of which only parts were read, by redacted path: their encoding is judged when all
    # parts are known. They are no part of the counts.
    tallies: dict[str, Tally] = field(default_factory=dict)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Report":
        """Return the report that ``dataclasses.asdict`` made a record of."""
        tallies = record.get("tallies", {})
        return cls(**{**record, "tallies": {path: Tally(**tallies[path]) for path in tallies}})

    def counts(self) -> dict[str, Any]:
        """Return the counts and first places, without the tallies."""
        counts = asdict(self)
        del counts["tallies"]
        return counts

    def merge(self, following: "Report") -> None:
        """Include the report of the span that was read next."""
        for counted in fields(self):
            if counted.type is int:
                total = getattr(self, counted.name) + getattr(following, counted.name)
                setattr(self, counted.name, total)
        self.first = following.first | self.first
        for path, found in following.tallies.items():
            self.add_tally(path, found)

    def add_tally(self, path: str, found: Tally) -> None:
        """Include what was read next of a file."""
        self.tallies.setdefault(redact(path), Tally()).include(found)

    def count(self, name: str, place: str, times: int = 1) -> None:
        """Count something that has a place."""
        setattr(self, name, getattr(self, name) + times)
        self.first.setdefault(name, place)

    def count_repaired(self, defects: dict[str, str]) -> None:
        """Count a document with these defects, if any: from the kind of defect to its place."""
        for defect, place in defects.items():
            self.count(defect, place)
        if defects:
            self.count("replaced", next(iter(defects.values())))

    def notes(self) -> list[str]:
        """Return a sentence for everything that a user may want to put right."""
        sentences = {
            "empty_files": "{} files are empty",
            "invalid_utf8": "{} documents had bytes that are not UTF-8, replaced by U+FFFD",
            "nul": "{} documents had NUL characters, replaced by U+FFFD",
            "skipped_records": "{} bad records were skipped",
        }
        return [
            f"{sentence.format(f'{getattr(self, name):,}')} (first: {self.first[name]})"
            for name, sentence in sentences.items()
            if getattr(self, name)
        ]


@dataclass(slots=True)
class Block:
    """Some consecutive lines of a file."""

    path: str  # of the file
    raw: bytes  # the lines as stored, with their line ends
    offset: int  # of the first byte in the file's text
    number: int  # of the first line, from 1; 0 if unknown
    inside: bool  # whether the lines begin inside the span that is read, or behind it
    lines: list[str]  # their text, repaired, without line ends
    defects: dict[int, tuple[str, ...]]  # what had to be repaired in a line, by its index

    def defects_at(self, index: int) -> dict[str, str]:
        """Return the defects of a line, each with its place."""
        if index not in self.defects:
            return {}
        return dict.fromkeys(self.defects[index], self.place(index))

    def place(self, index: int) -> str:
        """Return the place of a line for messages."""
        if self.number:
            return f"{self.path} line {self.number + index}"
        before = self.raw.split(b"\n")[:index]
        return f"{self.path} line at byte {self.offset + sum(map(len, before)) + index}"


def check_length(length: int, place: str) -> None:
    """Refuse a document longer than 256 MiB."""
    if length > MAX_DOCUMENT_BYTES:
        raise UserError(f"{place}: a document longer than 256 MiB; is it text? break it into lines")


def repaired(text: str | bytes) -> tuple[str, tuple[str, ...]]:
    """Return a text with U+FFFD for half surrogate pairs, NULs and bytes that are not UTF-8.

    The names of the defects found come with it.
    """
    defects: tuple[str, ...] = ()
    if isinstance(text, bytes):
        stored = text
        try:
            text = stored.decode()
        except UnicodeDecodeError:
            text = stored.decode(errors="replace")
            defects = ("invalid_utf8",)
    elif not text.isascii() and _HALF_PAIR.search(text):
        text = _HALF_PAIR.sub("\ufffd", text)
        defects = ("invalid_utf8",)
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
        defects = (*defects, "nul")
    return text, defects


def read_lines(
    content: BinaryIO, path: str, start: int, stop: int | None, report: Report
) -> Iterator[Block]:
    """Yield the lines that begin from byte ``start`` to before ``stop``, then the lines behind.

    Lines behind are yielded for as long as the caller asks for them: a paragraph may end there.
    If no line begins inside the span, nothing is yielded.

    Args:
        content: opened at ``max(start - 1, 0)``, since the byte before ``start`` tells whether a
            line begins at ``start``.
        stop: None: the end of the content.

    Raises:
        UserError: the content cannot be read to its end, or a line is longer than 256 MiB.
    """
    number = 0 if start else 1
    for raw, offset, inside in _raw_blocks(content, path, start, stop):
        text = raw
        if offset == 0:
            refuse_mark(raw, path)
        if offset == 0 and raw.startswith(_BYTE_ORDER_MARK):
            report.count("byte_order_marks", path)
            text = raw[len(_BYTE_ORDER_MARK) :]
        if b"\r" in raw:
            windows_line_ends = raw.count(b"\r\n")
            if inside and windows_line_ends:
                report.count("windows_line_ends", path, windows_line_ends)
            text = text.replace(b"\r\n", b"\n")
        lines, defects, found = _decoded(text.removesuffix(b"\n"))
        block = Block(path, raw, offset, number, inside, lines, defects)
        if inside:
            found.size = len(raw)  # with the line ends, so that it does not depend on the blocks
            found.first = block.place(min(defects)) if defects else ""
            report.add_tally(path, found)
        yield block
        number += len(lines) if number else 0


def _decoded(text: bytes) -> tuple[list[str], dict[int, tuple[str, ...]], Tally]:
    """Return lines as text, the defects of those that had to be repaired, by index, and a tally."""
    if b"\0" not in text:
        try:
            valid = text.decode()
            return valid.split("\n"), {}, Tally(len(text), len(text) - len(valid))
        except UnicodeDecodeError:
            pass
    pairs = [repaired(line) for line in text.split(b"\n")]
    lines = [line for line, _ in pairs]
    defects = {index: found for index, (_, found) in enumerate(pairs) if found}
    return lines, defects, tally(text, "\n".join(lines))


def _raw_blocks(
    content: BinaryIO, path: str, start: int, stop: int | None
) -> Iterator[tuple[bytes, int, bool]]:
    """Yield (whole lines, offset of their first byte, whether they begin before ``stop``)."""
    chunks = _chunks(content, path, max(start - 1, 0), stop)
    begin = 0
    if start:
        begin, rest = _skip_partial_line(chunks, start - 1, stop)
        chunks = itertools.chain([rest], chunks)
    if stop is None:
        for raw, offset in _whole_lines(chunks, path, begin):
            yield raw, offset, True
    elif begin < stop:
        for raw, offset in _whole_lines(chunks, path, begin):
            split = _bytes_inside(raw, offset, stop)
            if split:
                yield raw[:split], offset, True
            if split < len(raw):
                yield raw[split:], offset + split, False


def _bytes_inside(raw: bytes, offset: int, stop: int) -> int:
    """Return how many bytes of whole lines are lines that begin before ``stop``."""
    if offset >= stop:
        return 0
    # The first line end at or after byte stop - 1 ends the last of these lines.
    line_end = raw.find(b"\n", stop - 1 - offset)
    return len(raw) if line_end < 0 else line_end + 1


def _skip_partial_line(
    chunks: Iterator[bytes], position: int, stop: int | None
) -> tuple[int, bytes]:
    """Read past the first line end at or after ``position``.

    Returns:
        The offset behind the line end, and what was read behind it. If there is no line end before
        ``stop``, the offset is at least ``stop`` or the end of the content.
    """
    for chunk in chunks:
        end = chunk.find(b"\n") + 1
        if end:
            return position + end, chunk[end:]
        position += len(chunk)
        if stop is not None and position >= stop:
            break
    return position, b""


def _whole_lines(chunks: Iterable[bytes], path: str, begin: int) -> Iterator[tuple[bytes, int]]:
    """Yield (whole lines, offset of their first byte); only the last line may lack its end.

    A line that is too long is refused before it fills the memory.
    """
    pending: list[bytes] = []
    length = 0  # of what is pending
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            raw = b"".join((*pending, chunk[:end]))
            yield raw, begin
            begin += len(raw)
            pending = []
            length = 0
        pending.append(chunk[end:])
        length += len(chunk) - end
        check_length(length, f"{path} line at byte {begin}")
    raw = b"".join(pending)
    if raw:
        yield raw, begin


def _chunks(content: BinaryIO, path: str, position: int, stop: int | None) -> Iterator[bytes]:
    """Yield the content from ``position``, where it was opened, in chunks of bounded size.

    One chunk ends before byte ``stop - 1``: only a reader that asks for the end of the last line
    reads further.
    """
    while True:
        size = _BLOCK_BYTES
        if stop is not None and position < stop - 1:
            size = min(size, stop - 1 - position)
        try:
            chunk = content.read(size)
        except Exception as error:  # each decompressor, file system and network raises its own
            raise network.unreadable(path, position, error) from None
        if not chunk:
            return
        yield chunk
        position += len(chunk)
