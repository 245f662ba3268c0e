"""Which files, and how is their reading divided?

A corpus is a list of files: on the local disk, behind any fsspec URL, or the shards of a Hugging Face data set. They are cut into
pieces, the units of work for parallel and resumable reading: a pure function of the files' order and sizes, never of who reads them.
"""

import contextlib
import glob
import gzip
import lzma
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from kantai.errors import UserError

MIB = 1 << 20
HUB = "hub:"
# What text comes to when it is decompressed. Used to divide work and samples fairly, so a rough number will do.
COMPRESSION = 4
_COMPRESSED = {".gz", ".xz", ".zst"}
_HUB_SHARD_BYTES = 64 * MIB  # taken where a data set does not tell its size
_PIECES = 64  # of a corpus of middle size; enough for the processes of a machine to share evenly
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 4 * MIB, 128 * MIB
_BUFFER_BYTES = MIB
# Where file systems put what changes with a file's content, the best first.
_VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "Last-Modified", "mtime", "updated", "last_commit", "created")


@dataclass(frozen=True, slots=True)
class File:
    """Something that holds documents.

    Attributes:
        path: local path, fsspec URL, or ``hub:NAME[:CONFIG[:SPLIT]]``.
        size: bytes as stored; of a data set on the Hub, its shards.
        version: changes when the content does (modification time, ETag, revision); "" where the file system tells nothing.
    """

    path: str
    size: int
    version: str

    @property
    def suffixes(self) -> tuple[str, str]:
        """What is in the file and how it is compressed, in small letters, as in (".jsonl", ".gz"); "" for neither."""
        if self.path.startswith(HUB):
            return "", ""
        name = self.path.partition("?")[0] if _is_remote(self.path) else self.path
        name, last = os.path.splitext(name.lower())
        return (os.path.splitext(name)[1], last) if last in _COMPRESSED else (last, "")

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text it holds."""
        if self.path.startswith(HUB):
            return _hub_bytes(self.path) or self.size * _HUB_SHARD_BYTES
        return self.size * COMPRESSION if self.suffixes[1] else self.size


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that can be read alone: from byte (or shard) ``start`` to before ``stop``."""

    file: File
    start: int
    stop: int


Piece = tuple[Span, ...]


def find_files(inputs: Sequence[str]) -> list[File]:
    """The files behind paths, directories, globs, fsspec URLs (of files, directories and globs) and ``hub:NAME[:CONFIG[:SPLIT]]``.

    A directory, one that a glob matches too, means all files below it except hidden ones; links to directories are followed, but no
    directory is searched twice for an input. The order is fixed: that of the inputs, sorted within each, and no file comes twice.
    Empty files are kept, to be counted where they are read.

    Raises:
        UserError: an input matches nothing or cannot be reached, a link leads nowhere, a driver is not installed, or every file is empty.
    """
    found: dict[str, File] = {}
    for name in inputs:
        files = [_hub_file(name)] if name.startswith(HUB) else _remote_files(name) if _is_remote(name) else _local_files(name)
        before = len(found)
        for file in files:
            found.setdefault(file.path, file)
        if before == len(found) and not files:
            raise UserError(f"no input at {name}: give a text, .json(l), .csv or .parquet file, a directory of them, or a quoted glob")
    if not any(file.size for file in found.values()):
        first = next(iter(found))
        subject = f"{first} is empty" if len(found) == 1 else f"every one of {len(found)} files is empty, {first} the first"
        raise UserError(f"{subject}: see what was to write it")
    return list(found.values())


def cut(files: Iterable[File], *, splittable: Callable[[File], bool], piece_bytes: int | None = None) -> list[Piece]:
    """Divide files into pieces of about ``piece_bytes`` of text, in order.

    Small files come together in one piece, a large one is cut if that is possible and else a piece alone, and each shard of a data set
    on the Hub is a piece.

    Args:
        splittable: whether the parts of a file can be read alone.
        piece_bytes: default a 64th of the corpus, but at least 4 MiB and at most 128 MiB.
    """
    sized = [(file, file.text_bytes) for file in files]
    if piece_bytes is None:
        piece_bytes = min(max(sum(size for _, size in sized) // _PIECES, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    piece: list[Span] = []
    room = piece_bytes

    def close() -> None:
        nonlocal piece, room
        if piece:
            pieces.append(tuple(piece))
        piece, room = [], piece_bytes

    for file, text_bytes in sized:
        if file.path.startswith(HUB):
            close()
            pieces += [(Span(file, shard, shard + 1),) for shard in range(file.size)]
            continue
        if text_bytes > room and splittable(file):
            start = 0
            while file.size - start > room:
                piece.append(Span(file, start, start + room))
                start += room
                close()
            piece.append(Span(file, start, file.size))
            room -= file.size - start
        else:
            if text_bytes > room:
                close()
            piece.append(Span(file, 0, file.size))
            room -= text_bytes
        if room <= 0:
            close()
    close()
    return pieces


@contextlib.contextmanager
def open_file(file: File, start: int = 0) -> Iterator[BinaryIO]:
    """Open a file, decompressed, at a byte; ``start`` is 0 for a compressed one."""
    compression = file.suffixes[1]
    with _open(file, start) as stored:
        if compression == ".gz":
            with gzip.open(stored) as content:
                yield cast(BinaryIO, content)
        elif compression == ".xz":
            with lzma.open(stored) as content:
                yield cast(BinaryIO, content)
        elif compression == ".zst":
            import pyarrow as pa  # reads all frames and notices a missing end, which zstandard's own stream reader does not

            with pa.input_stream(stored, compression="zstd") as content:
                yield content
        else:
            yield stored


@lru_cache(maxsize=16)
def hub_dataset(path: str) -> Any:
    """The ``datasets.IterableDataset`` that ``hub:NAME[:CONFIG[:SPLIT]]`` names; a NAME that begins with . or / is a local folder.

    Raises:
        UserError: there is no such data set, or it cannot be reached.
    """
    split = (*path.removeprefix(HUB).split(":"), "", "")[2] or "train"
    try:
        return _hub_builder(path).as_streaming_dataset(split=split)
    except UserError:
        raise
    except Exception as error:  # of the library, the Hub or the network
        raise UserError(f"{path} cannot be opened: {error}") from None


def _is_remote(path: str) -> bool:
    return "://" in path


def _sorting_key(path: str) -> list[str]:
    return path.split("/")  # as directories are listed, not as "/" sorts among letters


def _local_files(pattern: str) -> list[File]:
    matches = [pattern] if os.path.lexists(pattern) else sorted(glob.iglob(pattern, recursive=True), key=_sorting_key)
    searched: set[tuple[int, int]] = set()
    found = {file.path: file for match in matches for file in _walk(str(Path(match)), searched)}
    return [found[path] for path in sorted(found, key=_sorting_key)]


def _walk(path: str, searched: set[tuple[int, int]]) -> Iterator[File]:
    """A file, or those below a directory that is not searched already: links may make a circle."""
    try:
        status = os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise
        raise UserError(f"{path} is a link to {os.readlink(path)}, which cannot be read: {error.strerror}; mend or remove it") from None
    if not stat.S_ISDIR(status.st_mode):
        yield File(path, status.st_size, str(status.st_mtime_ns))
    elif (place := (status.st_dev, status.st_ino)) not in searched:
        searched.add(place)
        for name in sorted(os.listdir(path)):
            if not name.startswith("."):
                yield from _walk(os.path.join(path, name), searched)


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec  # only here: local files need not wait for it
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return cast(tuple[Any, str], fsspec.url_to_fs(url))
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        package = f'"fsspec[{protocol}]"' if package == "fsspec" else package
        raise UserError(f"{url} needs a driver that is not installed: pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None


def _remote_files(url: str) -> list[File]:
    file_system, path = _file_system(url)
    try:
        infos = _remote_infos(file_system, path)
    except Exception as error:  # each driver has its own
        raise UserError(f"{url} cannot be listed: {error}") from None
    files = []
    for name in sorted(infos, key=_sorting_key):
        info = infos[name]
        if info.get("size") is None:
            raise UserError(f"{url}: the server does not tell the size of {name}; download it first")
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        files.append(File(file_system.unstrip_protocol(name), int(info["size"]), version))
    return files


def _remote_infos(file_system: Any, path: str) -> dict[str, dict[str, Any]]:
    try:
        found = {path: file_system.info(path)}
    except FileNotFoundError:
        found = file_system.glob(path, detail=True) if glob.has_magic(path) else {}
        shown = path if "/." in path else ""  # who asks for hidden files gets them
    else:
        shown = path
    searched = "\n"
    for name in sorted(found, key=_sorting_key):
        if found[name]["type"] != "file" and not f"{name}/".startswith(searched):
            searched = f"{name.rstrip('/')}/"
            found |= file_system.find(name, detail=True)
    return {name: info for name, info in found.items() if info["type"] == "file" and "/." not in name[len(shown) :]}


def _open(file: File, start: int) -> Any:
    if not _is_remote(file.path):
        stored = open(file.path, "rb", buffering=_BUFFER_BYTES)
        stored.seek(start)
        return stored
    file_system, path = _file_system(file.path)
    try:
        if file.path.startswith("http") and file.suffixes[0] != ".parquet":  # a Parquet file is read back to front
            return _open_http(file_system, path, start)
        stored = file_system.open(path, "rb")
        stored.seek(start)
        return stored
    except Exception as error:  # each driver has its own
        raise UserError(f"{file.path} cannot be opened: {error}") from None


def _open_http(file_system: Any, path: str, start: int) -> Any:
    if start:
        stored = file_system.open(path, "rb")
        try:
            stored.seek(start)
            stored.read(1)  # and what comes behind it stays in the buffer
            stored.seek(start)
            return stored
        except ValueError:  # this server can only send the whole: what is before is dropped
            stored.close()
    stored = file_system.open(path, "rb", block_size=0)
    while start and (dropped := len(stored.read(min(start, _BUFFER_BYTES)))):
        start -= dropped
    return stored


def _hub_builder(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} needs a library that is not installed: pip install datasets") from None
    name, config = (*path.removeprefix(HUB).split(":"), "")[:2]
    return datasets.load_dataset_builder(os.path.abspath(name) if name.startswith((".", "/")) else name, config or None)


def _hub_file(path: str) -> File:
    # The builder's hash is made of the revision, or of the modification times of local files.
    return File(path, hub_dataset(path).num_shards, _hub_builder(path).hash)


def _hub_bytes(path: str) -> int:
    data = hub_dataset(path)
    split = (data.info.splits or {}).get(str(data.split))
    return int(split.num_bytes or 0) if split else 0
