"""Cut long documents, so that the held-out split can be drawn from a book or a corpus in one line.

A document's split is drawn by its text. A corpus of one endless line would be one document, which
is trained on whole or held out whole. Documents of ordinary length stay as they are.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_CHARACTERS = 1 << 15  # some 5,000 English words; longer documents are cut
# Some 700 English words. They fill a row of 512 tokens, and 3 MB give enough parts to draw from.
_PART_CHARACTERS = 1 << 12
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
    """Yield parts of 2,048 to 4,096 characters: whole sentences where there are such.

    A text is cut at sentence ends, else at white space, else between any two characters. White
    space at a cut is dropped, nothing else.
    """
    start = 0
    while start < len(text):
        rest = len(text) - start
        parts = -(-rest // _PART_CHARACTERS)
        size = -(-rest // parts)  # equal parts: no tiny one is left at the end
        stop = len(text) if parts == 1 else _place_to_cut(text, start + size // 2, start + size)
        part = text[start:stop].strip()
        if part:
            yield part
        start = stop


def _place_to_cut(text: str, first: int, last: int) -> int:
    """Return the best place to cut a text, behind ``first`` and up to ``last``."""
    for pattern in (_SENTENCE_END, _WHITE_SPACE):
        ends = [match.end() for match in pattern.finditer(text, first, last)]
        if ends:
            return ends[-1]
    for place in range(last, first, -1):
        if not _holds_together(text, place):
            return place
    return last


def _holds_together(text: str, place: int) -> bool:
    """Whether the character at a place belongs to the one before it, as an accent does."""
    following = text[place]
    is_mark = unicodedata.category(following).startswith("M")
    return is_mark or _JOINER in (following, text[place - 1])
