"""Open input files, wherever they are, and decompress them."""

import contextlib
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO, cast

from kantai.errors import UserError
from kantai.preprocessing import formats
from kantai.preprocessing.compression import decompressed
from kantai.preprocessing.files import MIB, File, Member, file_system_of, is_remote
from kantai.storage import network

_BUFFER_BYTES = MIB
_BACKWARDS = (".parquet", ".zip")  # are read back to front, which needs a file that seeks


@contextlib.contextmanager
def open_file(file: File, start: int = 0) -> Iterator[BinaryIO]:
    """Open a file at byte ``start`` and decompress it; ``start`` is 0 for a compressed file.

    Raises:
        UserError: it cannot be opened, or its first bytes are those of another kind of file.
    """
    format_suffix, compression = file.suffixes
    if start:
        _check_beginning(file)
    with _open(file, start) as stored:
        if start or format_suffix in _BACKWARDS:  # their readers see what is no such file
            with decompressed(stored, compression) as content:
                yield content
            return
        buffered = _buffered(stored)
        if format_suffix == ".tar":
            with decompressed(buffered, compression) as content:
                yield content
            return
        if compression:
            formats.check_stored(file.path, _head(file, buffered), compression)
        with decompressed(buffered, compression) as content:
            formats.check_text(file.path, _head(file, content), format_suffix, file.format)
            yield content


class _ForwardReader(io.RawIOBase):
    """A remote file that is not asked again once its end was read; aiohttp warns of that."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self._ended = False

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to ``len(buffer)`` bytes."""
        data = b"" if self._ended else self._stored.read(len(buffer))
        self._ended = not data
        buffer[: len(data)] = data
        return len(data)


def _buffered(stored: Any) -> Any:
    """Return a file that shows its first bytes and lets them be read again."""
    if hasattr(stored, "peek"):
        return stored
    return io.BufferedReader(_ForwardReader(stored), _BUFFER_BYTES)


def _head(file: File, content: Any) -> bytes:
    """Return the first bytes, which stay to be read."""
    try:
        return bytes(content.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES])
    except Exception as error:  # each decompressor, file system and network raises its own
        raise network.unreadable(file.path, 0, error) from None


@lru_cache(maxsize=1024)
def _check_beginning(file: File) -> None:
    """Look at the first bytes of a file that is opened in the middle."""
    with open_file(file):
        pass


@contextlib.contextmanager
def seekable(content: BinaryIO) -> Iterator[BinaryIO]:
    """Copy what can only be read forwards to a temporary file."""
    # A member of a tar that is read as a stream cannot tell, or says yes.
    if not isinstance(content, tarfile.ExFileObject) and content.seekable():
        yield content
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(content, copy, _BUFFER_BYTES)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def _open(file: File, start: int) -> Any:
    if isinstance(file, Member):
        return file.content
    if not is_remote(file.path):
        stored = open(file.path, "rb", buffering=_BUFFER_BYTES)
        stored.seek(start)
        return stored
    file_system, path = file_system_of(file.path)
    try:
        if file.path.startswith("http"):
            if file.suffixes[0] in _BACKWARDS:
                return _open_http_seekable(file_system, path)
            return _open_http(file_system, path, start)
        stored = file_system.open(path, "rb")
        stored.seek(start)
        return stored
    except Exception as error:  # each driver raises its own
        raise UserError(f"{file.path} cannot be opened: {network.reason(error)}") from None


def _open_http(file_system: Any, path: str, start: int) -> Any:
    if start:
        stored = file_system.open(path, "rb")
        try:
            stored.seek(start)
            stored.read(1)  # the bytes after it stay in the buffer
            stored.seek(start)
            return stored
        except ValueError:  # the server can only send the whole file: read up to start and drop it
            stored.close()
    stored = file_system.open(path, "rb", block_size=0)
    while start:
        dropped = len(stored.read(min(start, _BUFFER_BYTES)))
        if not dropped:
            break
        start -= dropped
    return stored


def _open_http_seekable(file_system: Any, path: str) -> Any:
    stored = file_system.open(path, "rb")
    try:
        stored.seek(1)
        stored.read(1)
        stored.seek(0)
        return stored
    except ValueError:  # the server can only send the whole file
        stored.close()
    copy = tempfile.TemporaryFile()
    with file_system.open(path, "rb", block_size=0) as stored:
        shutil.copyfileobj(stored, copy, _BUFFER_BYTES)
    copy.seek(0)
    return copy
