"""Decompress files to the end of their last part, and tell a missing end from the end."""

import bz2
import contextlib
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

_CHUNK_BYTES = 1 << 17
_BUFFER_BYTES = 1 << 18
_MAX_WINDOW_LOG = 31  # zstd --long=31, of which archives of forums are made; it takes 2 GiB


@contextlib.contextmanager
def decompressed(stored: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    """Open the text of a stored file; ``compression`` is its suffix, "" for none."""
    if not compression:
        yield stored
    elif compression == ".gz":
        with gzip.open(stored) as content:
            yield cast(BinaryIO, content)
    elif compression == ".lz4":
        import pyarrow as pa

        with pa.input_stream(stored, compression="lz4") as content:
            yield io.BufferedReader(content, _BUFFER_BYTES)
    else:
        frames = _Frames(stored, _DECOMPRESSORS[compression], padded=compression == ".xz")
        with io.BufferedReader(frames, _BUFFER_BYTES) as content:
            yield content


class _Frames(io.RawIOBase):
    """Frames, one behind the other, as ``cat a.xz b.xz`` makes them.

    The readers of Python's own ``bz2`` and ``lzma`` silently leave out a frame whose first bytes
    are damaged, with all that follows.
    """

    def __init__(self, stored: BinaryIO, new: Callable[[], Any], *, padded: bool) -> None:
        self._stored = stored
        self._new = new
        self._padded = padded  # zero bytes may lie between frames
        self._decompressor = new()

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompress up to ``len(buffer)`` bytes, at least one unless the end is reached."""
        data = b""
        while not data:
            if self._decompressor.eof:
                rest = self._next_frame()
                if not rest:
                    return 0
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                rest = self._stored.read(_CHUNK_BYTES)
                if not rest:
                    raise EOFError("its end is missing")
            else:
                rest = b""
            data = self._decompressor.decompress(rest, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_frame(self) -> bytes:
        """Return the first bytes behind a frame; b"" if there are none."""
        rest: bytes = self._decompressor.unused_data
        while True:
            rest = rest or self._stored.read(_CHUNK_BYTES)
            if not self._padded or not rest or rest.strip(b"\0"):
                return rest.lstrip(b"\0") if self._padded else rest
            rest = b""


def _zstd_decompressor() -> Any:
    # pyarrow refuses windows beyond 128 MiB, as ``zstd --long=31`` makes them.
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    limit = {int(zstd.DecompressionParameter.window_log_max): _MAX_WINDOW_LOG}
    return zstd.ZstdDecompressor(options=limit)


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd_decompressor,
}
