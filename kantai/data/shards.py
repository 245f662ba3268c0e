"""Token shards: Hugging Face Arrow files, a document a row, mapped into memory without a copy.

A shard is one Arrow record batch with the single column ``input_ids``. Its values buffer is the
token stream, in which every document ends with ``</s>``. Its offsets are the document boundaries.
``datasets.load_dataset("arrow", data_files=...)`` reads it too.
"""

import errno
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from kantai.data.rng import Int32s, Int64s, TokenIds
from kantai.errors import UserError
from kantai.storage.atomic import (
    MANIFEST,
    Damaged,
    manifest_entry,
    parse_manifest,
    replaced,
    verify,
)
from kantai.storage.remote_cache import Cache, RemoteFile

SPLITS = ("train", "held_out")
SHARD_TOKENS = 1 << 25
# Smaller shards are joined. It is half of what the 4 MiB of a small corpus's piece give: a shard
# of these stays as it is.
MIN_SHARD_TOKENS = 1 << 19
TOKEN_COUNTS = "token_counts.npy"
_MAX_UINT16_IDS = 1 << 16
_OPEN_AT_ONCE = 512
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_QUICKLY_HASHED_BYTES = 1 << 32
_WRITE_AGAIN = "write them again with scripts/tokenize_corpus.py"
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Entry(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    file: str
    documents: _Count
    tokens: _Count


class _Split(TypedDict):
    shards: list[_Entry]
    documents: _Count
    tokens: _Count
    unigram_entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Manifest(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]
    kind: Literal["shards"]
    tokenizer: str
    vocab_size: _Count
    dtype: Literal["uint16", "uint32"]
    source: dict[str, Any]
    report: dict[str, Any]
    splits: dict[str, _Split]
    files: dict[str, dict[str, Any]]


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Shard:
    """A shard, memory-mapped."""

    tokens: TokenIds
    boundaries: Int32s  # starts of the documents and the end of the last, [documents + 1]

    @property
    def lengths(self) -> Int64s:
        """Tokens of each document, its ``</s>`` included."""
        return np.diff(self.boundaries).astype(np.int64)


class Split:
    """The shards of a split in order.

    The manifest gives the size of each; a shard is opened when it is first read.
    """

    def __init__(self, entries: list[dict[str, Any]], open_file: Callable[[str], Shard]) -> None:
        self.files: list[str] = [entry["file"] for entry in entries]
        self.documents: Int64s = np.array([entry["documents"] for entry in entries], np.int64)
        self.tokens: Int64s = np.array([entry["tokens"] for entry in entries], np.int64)
        self.open_at_once = _OPEN_AT_ONCE
        self._open_file = open_file
        self._opened: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        """One shard.

        More than ``open_at_once`` shards are never kept open: a process may not map that many, or
        the cache not hold them. The least recently used is closed first.

        Raises:
            UserError: the shard differs from the manifest, or cannot be fetched.
        """
        if number in self._opened:
            self._opened.move_to_end(number)
        else:
            shard = self._open(self.files[number])
            sizes = (len(shard.tokens), len(shard.boundaries) - 1)
            if sizes != (self.tokens[number], self.documents[number]):
                name = self.files[number]
                raise UserError(
                    f"damaged shards: {name} is not as its manifest says; {_WRITE_AGAIN}"
                )
            self._opened[number] = shard
            while len(self._opened) > self.open_at_once:
                self._opened.popitem(last=False)
        return self._opened[number]

    def _open(self, name: str) -> Shard:
        """Open a shard; where the system has no room for one more, close half of the others."""
        while True:
            try:
                return self._open_file(name)
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._opened:
                    raise
            self.open_at_once = max(1, len(self._opened) // 2)
            while len(self._opened) >= self.open_at_once:
                self._opened.popitem(last=False)


@dataclass(frozen=True)
class ShardSet:
    """An opened set of shards."""

    manifest: dict[str, Any]
    splits: dict[str, Split]
    open_file: Callable[[str], BinaryIO]
    cache: Cache | None  # of shards at a URL

    def token_counts(self) -> Int64s:
        """Occurrences of each entry of the vocabulary, [splits, vocabulary].

        Raises:
            UserError: the file of counts is damaged.
        """
        try:
            with self.open_file(TOKEN_COUNTS) as file:
                counts: Int64s = np.load(file, allow_pickle=False)
            shape = (len(SPLITS), self.manifest["vocab_size"])
            if counts.shape != shape or counts.dtype != np.int64:
                raise ValueError(f"shape {counts.shape} of {counts.dtype}")
        except (ValueError, EOFError, KeyError, SyntaxError) as error:
            raise UserError(
                f"damaged shards: {TOKEN_COUNTS} is no table of counts: {error}; {_WRITE_AGAIN}"
            ) from None
        return counts

    def prefetch(self, split: str, numbers: list[int]) -> None:
        """Fetch shards to this node in the background, in this order, if they are at a URL."""
        if self.cache is not None:
            names = (self.splits[split].files[number] for number in numbers)
            self.cache.prefetch([_remote_file(self.manifest, name) for name in names])


def open_shards(
    location: str | Path, *, hashes: bool | None = None, cache: Callable[[str], Cache] | None = None
) -> ShardSet:
    """Open a set of shards.

    Shards in a folder are mapped into memory; shards at a URL are fetched when they are read.

    Args:
        hashes: compare every byte of a folder with the manifest's SHA-256, and not only the sizes.
            None: do so where it takes seconds. What is fetched is always compared.
        cache: makes the node's cache for a URL.

    Raises:
        UserError: the location holds no shards, or damaged ones.
    """
    try:
        if "://" not in str(location):
            return _open_folder(Path(location), hashes)
        if cache is None:
            raise UserError(
                f"{location} is not on this machine: train from it, or copy it to a folder first"
            )
        return _open_remote(cache(str(location)), str(location))
    except Damaged as damage:
        raise UserError(f"damaged shards: {damage}; {_WRITE_AGAIN}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{location} is not a folder of shards: write one with scripts/tokenize_corpus.py"
        ) from None


class ShardWriter:
    """Collects documents, and writes a shard whenever there are enough tokens for one."""

    def __init__(
        self, prefix: Path, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """Write ``PREFIX-000.arrow``, ``PREFIX-001.arrow`` and so on."""
        self.prefix = prefix
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._tokens: list[TokenIds] = []
        self._lengths: list[Int64s] = []
        self._collected = 0

    def append(self, tokens: TokenIds, lengths: Int64s) -> None:
        """Append documents.

        Args:
            tokens: of all documents one after another; each document ends with ``</s>``.
            lengths: tokens of each document.
        """
        if self._collected and self._collected + len(tokens) > self.shard_tokens:
            self._write_shard()
        self._tokens.append(tokens.astype(self.dtype))
        self._lengths.append(lengths)
        self._collected += len(tokens)

    def finish(self) -> list[dict[str, Any]]:
        """Write the last shard and return the entries of all; see :func:`write_shard`."""
        if self._collected:
            self._write_shard()
        return self.shards

    def _write_shard(self) -> None:
        tokens = np.concatenate(self._tokens)
        lengths = np.concatenate(self._lengths)
        self._reset()
        path = self.prefix.with_name(f"{self.prefix.name}-{len(self.shards):03d}.arrow")
        self.shards.append(write_shard(path, tokens, lengths))


def write_shard(path: Path, tokens: TokenIds, lengths: Int64s) -> dict[str, Any]:
    """Write one shard atomically; return its entry: file, documents, tokens, bytes, sha256."""
    boundaries = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int32)
    documents = pa.ListArray.from_arrays(pa.array(boundaries), pa.array(tokens))
    batch = pa.record_batch([documents], names=["input_ids"])
    with replaced(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        return {
            "file": path.name,
            "documents": len(lengths),
            "tokens": len(tokens),
            **manifest_entry(partial),
        }


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of a vocabulary's ids: two bytes up to 65,536 entries, else four."""
    return np.dtype(np.uint16 if vocab_size <= _MAX_UINT16_IDS else np.uint32)


def map_shard(file: BinaryIO) -> Shard:
    """Map one shard into memory.

    Raises:
        UserError: the file is no shard.
        OSError: the system cannot map it, for example because too many files are open.
    """
    try:
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        column = pa.ipc.open_stream(content).read_all().column("input_ids").chunk(0)
        column.validate()  # compares the buffers with their announced sizes
        tokens = column.values.to_numpy(zero_copy_only=True)
        boundaries = column.offsets.to_numpy(zero_copy_only=True)
        if (boundaries[0], boundaries[-1]) != (0, len(tokens)) or (np.diff(boundaries) < 0).any():
            raise ValueError("its documents do not follow each other")
        return Shard(tokens, boundaries)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The system's error says nothing of the content. Arrow's own have no number.
            raise OSError(error.errno, error.strerror, file.name) from None
        raise UserError(f"damaged shards: {file.name} is none: {error}; {_WRITE_AGAIN}") from None


def _open_folder(folder: Path, hashes: bool | None) -> ShardSet:
    if not folder.is_dir():
        raise UserError(f"no shards at {folder}: write them with scripts/tokenize_corpus.py")
    manifest = verify(folder, hashes=False)
    if hashes is None:
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        hashes = size < _QUICKLY_HASHED_BYTES
    if hashes:
        verify(folder)
    return _shard_set(manifest, lambda name: (folder / name).open("rb"), None)


def _open_remote(cache: Cache, url: str) -> ShardSet:
    manifest = parse_manifest(cache.read_small(MANIFEST), f"{url}/{MANIFEST}")
    return _shard_set(manifest, lambda name: cache.open(_remote_file(manifest, name)), cache)


def _shard_set(
    manifest: dict[str, Any], open_file: Callable[[str], BinaryIO], cache: Cache | None
) -> ShardSet:
    _MANIFEST.validate_python(manifest)
    dtype = np.dtype(manifest["dtype"])

    def open_shard(name: str) -> Shard:
        with open_file(name) as file:
            shard = map_shard(file)
        if shard.tokens.dtype != dtype:
            held = shard.tokens.dtype
            raise UserError(f"damaged shards: {name} holds {held}, not {dtype}; {_WRITE_AGAIN}")
        return shard

    splits = {name: Split(manifest["splits"][name]["shards"], open_shard) for name in SPLITS}
    return ShardSet(manifest, splits, open_file, cache)


def _remote_file(manifest: dict[str, Any], name: str) -> RemoteFile:
    entry = manifest["files"][name]
    return RemoteFile(name, entry["bytes"], entry["sha256"])
