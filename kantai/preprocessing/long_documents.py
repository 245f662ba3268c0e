"""Cut long documents, so that the held-out split can be drawn from a book or a corpus in one line.

A document's split is drawn by its text. A corpus of one endless line would be one document, which
is trained on whole or held out whole. Documents of ordinary length stay as they are.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_CHARACTERS = 1 << 15  # some 5,000 English words; longer documents are cut
# Some 350 to 700 English words. They fill a row of 512 tokens, and 3 MB give 1,000 parts to draw
# from.
_MIN_PART = 1 << 11
_MAX_PART = 1 << 12
_MIN_LAST = 1 << 10
_HASHED_CHARACTERS = 32
_SENTENCE_END = re.compile(
    r"""\n\s*\n  # a blank line
    | [.!?…։؟۔።፧፨]+ ["'”’»)\]]* \s+  # scripts that write a space behind a sentence
    | [。！？．｡।॥။៕]+ ["'”’」』）】》]*  # scripts that may write none
    """,  # noqa: RUF001
    re.VERBOSE,
)
_WHITE_SPACE = re.compile(r"\s+")
_JOINER = "\u200d"  # holds emoji and letters together


@dataclass
class LongDocuments:
    """Cuts long documents, and counts them.

    Attributes:
        documents: how many were cut.
        parts: how many documents they became.
    """

    documents: int = 0
    parts: int = 0

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield texts, and the parts of those that are longer than 32,768 characters."""
        for text in texts:
            if len(text) <= MAX_CHARACTERS:
                yield text
                continue
            self.documents += 1
            for part in cut_text(text):
                self.parts += 1
                yield part


def cut_text(text: str) -> Iterator[str]:
    """Yield parts of 2,048 to 4,096 characters, the last of 1,024 or more.

    A text is cut at a sentence end, else at white space, else between any two characters. White
    space at a cut is dropped, nothing else. Of several places, the text behind them decides, so
    that two texts which have a chapter in common are soon cut at the same places of it: its parts
    are then known as equal.
    """
    start = 0
    while start < len(text):
        rest = len(text) - start
        stop = len(text)
        if rest > _MAX_PART:
            stop = _place_to_cut(text, start + _MIN_PART, min(start + _MAX_PART, stop - _MIN_LAST))
        part = text[start:stop].strip()
        if part:
            yield part
        start = stop


def _place_to_cut(text: str, first: int, last: int) -> int:
    """Choose where to cut a text, behind ``first`` and up to ``last``."""
    places: list[int] = []
    for pattern in (_SENTENCE_END, _WHITE_SPACE):
        places = places or [match.end() for match in pattern.finditer(text, first, last)]
    between = (place for place in range(first + 1, last + 1) if not _holds_together(text, place))
    # Of equal hashes, as where one character is repeated, the last place makes the fewest parts.
    return min(places or between, key=lambda place: (_hash_at(text, place), -place), default=last)


def _hash_at(text: str, place: int) -> int:
    return zlib.crc32(text[place : place + _HASHED_CHARACTERS].encode())


def _holds_together(text: str, place: int) -> bool:
    """Whether the character at a place belongs to the one before it, as an accent does."""
    following = text[place]
    is_mark = unicodedata.category(following).startswith("M")
    return is_mark or _JOINER in (following, text[place - 1])
