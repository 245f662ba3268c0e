"""Pieces of a corpus: the units of parallel and resumable reading.

Pieces depend on the order and sizes of the files alone, never on the number of processes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kantai.preprocessing.files import HUB, MIB, File

_PIECES = 64  # in a corpus of 256 MiB to 8 GiB: enough for the cores of a machine to share evenly
_MIN_PIECE_BYTES = 4 * MIB
_MAX_PIECE_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that can be read alone: bytes (or shards) ``start`` to ``stop - 1``."""

    file: File
    start: int
    stop: int


Piece = tuple[Span, ...]


def cut(
    files: Iterable[File], *, splittable: Callable[[File], bool], piece_bytes: int | None = None
) -> list[Piece]:
    """Divide files into pieces of about ``piece_bytes`` of text, in order.

    Small files share a piece. A large file is cut if it is splittable, and is a piece alone if not.
    Each shard of a data set on the Hub is a piece.

    Args:
        piece_bytes: default: 1/64 of the corpus, but at least 4 MiB and at most 128 MiB.
    """
    sized = [(file, file.text_bytes) for file in files]
    if piece_bytes is None:
        share = sum(text_bytes for _, text_bytes in sized) // _PIECES
        piece_bytes = min(max(share, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
    builder = _PieceBuilder(piece_bytes)
    for file, text_bytes in sized:
        if file.path.startswith(HUB):
            builder.place_shards(file)
        elif text_bytes > builder.room and splittable(file):
            builder.place_in_parts(file)
        else:
            builder.place_whole(file, text_bytes)
    return builder.finish()


class _PieceBuilder:
    """Fills one piece after another with spans of files."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._pieces: list[Piece] = []
        self._start_piece()

    def _start_piece(self) -> None:
        self._spans: list[Span] = []
        self.room = self._piece_bytes  # bytes of text that the open piece can still take

    def _finish_piece(self) -> None:
        if self._spans:
            self._pieces.append(tuple(self._spans))
        self._start_piece()

    def _place(self, span: Span, text_bytes: int) -> None:
        self._spans.append(span)
        self.room -= text_bytes
        if self.room <= 0:
            self._finish_piece()

    def place_shards(self, file: File) -> None:
        """Make each shard of a data set a piece."""
        self._finish_piece()
        self._pieces += [(Span(file, shard, shard + 1),) for shard in range(file.size)]

    def place_whole(self, file: File, text_bytes: int) -> None:
        """Put a file into the open piece, or into the next if it does not fit."""
        if text_bytes > self.room:
            self._finish_piece()
        self._place(Span(file, 0, file.size), text_bytes)

    def place_in_parts(self, file: File) -> None:
        """Fill the open piece with the first part of a file, and further pieces with the rest."""
        start = 0
        while start < file.size:
            stop = min(start + self.room, file.size)
            self._place(Span(file, start, stop), stop - start)
            start = stop

    def finish(self) -> list[Piece]:
        """Return all pieces."""
        self._finish_piece()
        return self._pieces
