"""Find input files.

A corpus is a list of files: on the local disk, behind any fsspec URL, or the shards of a Hugging
Face data set.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from kantai.errors import UserError
from kantai.preprocessing import formats
from kantai.storage import network

MIB = 1 << 20
HUB = "hub:"
# Bytes of text in a compressed byte, roughly. It divides work and samples fairly.
COMPRESSION = 4
_HUB_SHARD_BYTES = 64 * MIB  # assumed where a data set does not state its size
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
        name = self.path.partition("?")[0] if is_remote(self.path) else self.path
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
    if is_remote(file.path):
        file_system_of(file.path)[0].invalidate_cache()
    found = [(again.size, again.version) for again in _find_input(file.path)]
    return found != [(file.size, file.version)]


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


def is_remote(path: str) -> bool:
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
    if is_remote(name):
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
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{path} is a pipe or a device: write what it gives to a file first, as an input "
                "is read more than once"
            )
        yield File(path, status.st_size, str(status.st_mtime_ns))
        return
    directory = (status.st_dev, status.st_ino)
    if directory in searched:
        return
    searched.add(directory)
    for name in sorted(os.listdir(path)):
        if not name.startswith("."):
            yield from _walk(os.path.join(path, name), searched)


def file_system_of(url: str) -> tuple[Any, str]:
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
    file_system, path = file_system_of(url)
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
