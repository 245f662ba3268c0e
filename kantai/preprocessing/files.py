"""Input files: find them, cut them into pieces of work, open them decompressed.

A corpus is a list of files: on the local disk, behind any fsspec URL, or the shards of a Hugging
Face data set. Pieces are the units of parallel and resumable reading. They depend on the order and
sizes of the files alone, never on the number of processes.
"""

import contextlib
import glob
import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from kantai.errors import UserError
from kantai.preprocessing import formats
from kantai.preprocessing.compression import decompressed
from kantai.storage import network

MIB = 1 << 20
HUB = "hub:"
# Bytes of text in a compressed byte, roughly. It divides work and samples fairly.
COMPRESSION = 4
_HUB_SHARD_BYTES = 64 * MIB  # assumed where a data set does not state its size
_PIECES = 64  # in a corpus of 256 MiB to 8 GiB: enough for the cores of a machine to share evenly
_MIN_PIECE_BYTES = 4 * MIB
_MAX_PIECE_BYTES = 128 * MIB
_BUFFER_BYTES = MIB
_BACKWARDS = (".parquet", ".zip")  # are read back to front, which needs a file that seeks
# The keys under which file systems state a file's version, the most reliable first.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "mtime",
    "updated",
    "last_commit",
    "created",
)


@dataclass(frozen=True, slots=True)
class File:
    """An input file, or a data set on the Hub."""

    path: str  # local path, fsspec URL, or ``hub:NAME[:CONFIG[:SPLIT]]``
    size: int  # bytes as stored; for a data set on the Hub, the number of its shards
    version: str  # modification time, ETag or revision; "" where the file system states none
    format: str = ""  # what ``--format`` says; "" leaves it to the name

    @property
    def is_data_set(self) -> bool:
        """Whether it is a data set on the Hub."""
        return self.path.startswith(HUB)

    @property
    def suffixes(self) -> tuple[str, str]:
        """Format and compression in lower case, such as (".jsonl", ".gz"); "" if absent."""
        if self.path.startswith(HUB):
            return "", ""
        name = self.path.partition("?")[0] if _is_remote(self.path) else self.path
        return formats.suffixes(name, self.format)

    @property
    def is_compressed(self) -> bool:
        """Whether the stored bytes say little about how much text there is."""
        format_suffix, compression = self.suffixes
        return bool(compression) or format_suffix == ".zip"

    @property
    def text_bytes(self) -> int:
        """An estimate of the bytes of text in the file."""
        if self.path.startswith(HUB):
            return _hub_bytes(self.path) or self.size * _HUB_SHARD_BYTES
        return self.size * COMPRESSION if self.is_compressed else self.size


@dataclass(frozen=True, slots=True)
class Member(File):
    """A file in an archive, which is open while the archive is read."""

    content: BinaryIO = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that can be read alone: bytes (or shards) ``start`` to ``stop - 1``."""

    file: File
    start: int
    stop: int


Piece = tuple[Span, ...]


def find_files(inputs: Sequence[str], stated: str | None = None) -> list[File]:
    """Find the input files behind paths, directories, globs, fsspec URLs and Hub data sets.

    A directory, also one that a glob matches, stands for all files below it except hidden ones.
    Links to directories are followed, but one input searches no directory twice. Files come in the
    order of the inputs, sorted within each input, and each file once, by its first name, whatever
    other names and links lead to it. Empty files are kept: readers count them. What Spark writes
    beside its files is left out.

    Args:
        inputs: URLs may name files, directories and globs; data sets are
            ``hub:NAME[:CONFIG[:SPLIT]]``.
        stated: the format of the files, whatever they are called.

    Raises:
        UserError: an input matches nothing or cannot be reached, a link leads nowhere, a driver is
            not installed, a directory or glob has text and records, or every file is empty.
    """
    found: dict[str, File] = {}  # by what is the same for all spellings of a file
    for name in inputs:
        files = _of_one_kind(name, _find_input(name), stated)
        if not files:
            raise UserError(
                f"no input at {name}: give a text, .json(l), .csv, .tsv or .parquet file, "
                "a directory of them, or a quoted glob"
            )
        for file in files:
            found.setdefault(_identity(file.path), file)
    if not any(file.size for file in found.values()):
        first = next(iter(found.values())).path
        if len(found) == 1:
            subject = f"{first} is empty"
        else:
            subject = f"every one of {len(found)} files is empty, {first} the first"
        raise UserError(f"{subject}: check the program that wrote it")
    return list(found.values())


def refuse_shared(train: Sequence[File], held_out: Sequence[File]) -> None:
    """Refuse a held-out file that is trained on.

    Raises:
        UserError: a file is in both inputs.
    """
    trained_on = {_identity(file.path) for file in train}
    for file in held_out:
        if _identity(file.path) in trained_on:
            raise UserError(
                f"{file.path} is in both --input and --held_out_input: leave it out of --input, "
                "or it is trained on"
            )


def has_changed(file: File) -> bool:
    """Look at a file again: whether its size or version is another one, or it is gone."""
    if _is_remote(file.path):
        _file_system(file.path)[0].invalidate_cache()
    found = [(again.size, again.version) for again in _find_input(file.path)]
    return found != [(file.size, file.version)]


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


@lru_cache(maxsize=16)
def hub_dataset(path: str) -> Any:
    """Open ``hub:NAME[:CONFIG[:SPLIT]]`` as a ``datasets.IterableDataset``.

    A NAME that begins with . or / is a local folder.

    Raises:
        UserError: there is no such data set, or it cannot be reached.
    """
    _, _, split = _hub_parts(path)
    try:
        return _hub_builder(path).as_streaming_dataset(split=split or "train")
    except UserError:
        raise
    except Exception as error:  # from the library, the Hub or the network
        raise UserError(f"{path} cannot be opened: {error}") from None


def _identity(path: str) -> str:
    """Return what is the same for all spellings of a path, URL or data set.

    Links are resolved, but no numbers of files are compared: some network file systems give the
    same one to several, and text would be lost.
    """
    if path.startswith(HUB):
        name, config, split = _hub_parts(path)
        if name.startswith((".", "/")):
            name = os.path.realpath(name)
        return f"{HUB}{name}:{config or 'default'}:{split or 'train'}"
    protocol, separator, rest = path.partition("://")
    if not separator:
        return os.path.realpath(path)
    if protocol.lower() in ("file", "local"):
        return os.path.realpath(rest)
    if protocol.lower() in ("http", "https"):
        from yarl import URL

        return str(URL(path).with_fragment(None))
    return path


def _is_remote(path: str) -> bool:
    return "://" in path


def _sorting_key(path: str) -> list[str]:
    return path.split("/")  # the order of directory listings: "a/b" before "a-b"


def _of_one_kind(name: str, files: list[File], stated: str | None) -> list[File]:
    """Return the files of an input that hold data; refuse text among records.

    Only the names are looked at, since there may be a hundred thousand remote files.
    """
    if len(files) > 1:
        files = [file for file in files if _name(file.path) not in formats.BOOKKEEPING]
    if stated:
        files = [replace(file, format=stated) for file in files]
    full = [file for file in files if file.size]
    if len(full) > 1:
        paths = [file.path for file in full]
        formats.check_one_kind(name, paths, [file.suffixes[0] for file in full])
    return files


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _find_input(name: str) -> list[File]:
    if name.startswith(HUB):
        # The builder hashes the revision, or the modification times of local files.
        return [File(name, hub_dataset(name).num_shards, _hub_builder(name).hash)]
    if _is_remote(name):
        return _remote_files(name)
    return _local_files(name)


def _local_files(pattern: str) -> list[File]:
    if os.path.lexists(pattern):
        matches = [pattern]
    else:
        matches = sorted(glob.iglob(pattern, recursive=True), key=_sorting_key)
    searched: set[tuple[int, int]] = set()
    found: dict[str, File] = {}
    for match in matches:
        for file in _walk(str(Path(match)), searched):
            found[file.path] = file
    return [found[path] for path in sorted(found, key=_sorting_key)]


def _walk(path: str, searched: set[tuple[int, int]]) -> Iterator[File]:
    """Yield a file, or the files below a directory.

    Directories in ``searched`` are left out, since links may form a circle.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which cannot be read: {error.strerror}; "
            "mend or remove it"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        yield File(path, status.st_size, str(status.st_mtime_ns))
        return
    directory = (status.st_dev, status.st_ino)
    if directory in searched:
        return
    searched.add(directory)
    for name in sorted(os.listdir(path)):
        if not name.startswith("."):
            yield from _walk(os.path.join(path, name), searched)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in that file system."""
    import fsspec  # imported here, so that local files need not wait for it
    from fsspec.registry import known_implementations

    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    url = f"{protocol}://{rest}"
    try:
        options = network.http_options(url, network.STALL_SECONDS)
        return cast(tuple[Any, str], fsspec.url_to_fs(url, **options))
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        if package == "fsspec":
            package = f'"fsspec[{protocol}]"'
        raise UserError(
            f"{url} needs a driver that is not installed: pip install {package}"
        ) from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None


def _remote_files(url: str) -> list[File]:
    file_system, path = _file_system(url)
    try:
        infos = _remote_infos(file_system, path)
    except Exception as error:  # each driver raises its own
        raise UserError(f"{url} cannot be reached: {network.reason(error)}") from None
    files = []
    for name in sorted(infos, key=_sorting_key):
        info = infos[name]
        if info.get("size") is None:
            raise UserError(
                f"{url}: the server does not state the size of {name}; download it first"
            )
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        files.append(File(file_system.unstrip_protocol(name), int(info["size"]), version))
    return files


def _remote_infos(file_system: Any, path: str) -> dict[str, dict[str, Any]]:
    """Return fsspec's information on every file that a path or glob stands for, by name."""
    try:
        found = {path: file_system.info(path)}
        not_hidden = path  # someone who names a hidden directory gets its files
    except FileNotFoundError as error:
        if not network.is_missing(error) and not glob.has_magic(path):
            raise
        found = file_system.glob(path, detail=True) if glob.has_magic(path) else {}
        not_hidden = path if "/." in path else ""
    searched = "\n"  # the last directory searched; at first none, as no name begins like this
    for name in sorted(found, key=_sorting_key):
        if found[name]["type"] != "file" and not f"{name}/".startswith(searched):
            searched = f"{name.rstrip('/')}/"
            found |= file_system.find(name, detail=True)
    return {
        name: info
        for name, info in found.items()
        if info["type"] == "file" and "/." not in name[len(not_hidden) :]
    }


def _open(file: File, start: int) -> Any:
    if isinstance(file, Member):
        return file.content
    if not _is_remote(file.path):
        stored = open(file.path, "rb", buffering=_BUFFER_BYTES)
        stored.seek(start)
        return stored
    file_system, path = _file_system(file.path)
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


def _hub_parts(path: str) -> tuple[str, str, str]:
    """Split ``hub:NAME[:CONFIG[:SPLIT]]`` into name, config and split; "" for an absent one."""
    name, config, split = (*path.removeprefix(HUB).split(":"), "", "")[:3]
    return name, config, split


def _hub_builder(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path} needs a library that is not installed: pip install datasets"
        ) from None
    name, config, _ = _hub_parts(path)
    if name.startswith((".", "/")):
        name = os.path.abspath(name)
    return datasets.load_dataset_builder(name, config or None)


def _hub_bytes(path: str) -> int:
    data = hub_dataset(path)
    split = (data.info.splits or {}).get(str(data.split))
    return int(split.num_bytes or 0) if split else 0
