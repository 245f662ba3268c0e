"""How do remote files reach this node? Through a folder of it: fetched once, checked on arrival, evicted under a size limit.

All processes of a node share the folder, which must be local to the node::

    FOLDER/lock                            held while files appear or are evicted
    FOLDER/URL-DIGEST/SHA256               a whole file; its modification time is when it was last used
    FOLDER/URL-DIGEST/SHA256.lock          held by the one process that downloads it
    FOLDER/URL-DIGEST/SHA256.ID.partial    a download; if nobody holds the lock, that of a process which died

The locks are ``flock``'s: the kernel frees them with the process, however that ends. Nothing is fsynced, since all of it can be had
again; what a loss of power cut short under its final name is told by its size, which every opening compares.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import itertools
import math
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

from kantai.errors import UserError

T = TypeVar("T")
_PASSING_STATUSES = (408, 425, 429)  # of the HTTP statuses that blame the client, those that ask it to come again
_jitter = random.SystemRandom()  # ranks may share the seed of random, and would all come back at the same moment


@dataclass(frozen=True)
class RemoteFile:
    """A file as a remote manifest lists it: path below the URL, size in bytes, SHA-256 of the content as hexadecimal digits.

    Raises:
        UserError: the path may lead elsewhere, or the hash is none. Manifests come from others.
    """

    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.=+ -]+(/[\w.=+ -]+)*", self.name) or not {".", ".."}.isdisjoint(self.name.split("/")):
            raise UserError(f"the manifest lists {self.name!r}, which is no plain path below it: see who wrote it")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256) or self.size < 0:
            raise UserError(f"the manifest lists {self.name} with a size or SHA-256 that no file has: see who wrote it")


class _Wish(NamedTuple):
    files: tuple[RemoteFile, ...]
    asked_ns: int


class Cache:
    """The files below a URL, read through a folder that all processes of this node share, forked children included.

    Whole files in the folder, those of other URLs included, never take more than the limit. Downloads under way come on top.

    Args:
        url: anything fsspec reads: ``s3://``, ``gs://``, ``hf://``, ``https://``, ... What its driver needs to know is set in the
            environment or in fsspec's configuration.
        folder: made if it is not there.
        limit_bytes: beyond it, the least recently used files are evicted. Who has one open or mapped keeps it: the system removes the
            bytes with their last user.
        tries: times that a transfer is begun before it has failed.
        backoff_seconds: mean wait after the first try; it doubles with each one, up to a minute. By default the waits add up to a minute.
        stall_seconds: a try that brings nothing for so long has failed.

    Raises:
        UserError: nothing that is installed reads such a URL.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        limit_bytes: int,
        *,
        tries: int = 6,
        backoff_seconds: float = 2.0,
        stall_seconds: float = 60.0,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._remote = _Remote(url, tries, backoff_seconds, stall_seconds)
        self._folder = folder
        self._files = folder / hashlib.sha256(self._remote.url.encode()).hexdigest()[:16]
        self._files.mkdir(parents=True, exist_ok=True)
        self._wish: _Wish | None = None

    def open(self, file: RemoteFile) -> BinaryIO:
        """A whole, checked file, downloaded if the node does not have it. Once open it stays readable, evicted or not.

        Raises:
            UserError: it cannot be had, or does not fit.
        """
        if file.size > self.limit_bytes:
            url = f"{self._remote.url}/{file.name}"
            raise UserError(f"{url} has {file.size} bytes, and the cache may hold {self.limit_bytes}: raise its limit")
        found = _use(self._path(file), file.size)
        if found is not None:
            return found
        with _locked(self._path(file, ".lock")):
            # Whoever held the lock before us may have brought it.
            return _use(self._path(file), file.size) or self._remote.persist(file.name, lambda: self._download_or_free(file))

    def read_small(self, name: str) -> bytes:
        """The content of a small file, such as a manifest. It is not kept: it may be another one tomorrow.

        Raises:
            UserError: it cannot be had.
        """
        return self._remote.persist(name, lambda: self._remote.read(name))

    def prefetch(self, wanted: Sequence[RemoteFile]) -> None:
        """Ask for files to be brought in this order by a background thread, instead of what this process asked for before.

        It takes as many of the first as the limit holds, evicts nothing that anyone used or asked for since this call, and leaves out
        what fails: :meth:`open` will say why.
        """
        self._wish = wish = _Wish(tuple(wanted), time.time_ns())
        # A thread for each wish, and not one that waits for wishes: there is nothing that a forked child would have to repair.
        threading.Thread(target=self._bring, args=(wish,), name="prefetch", daemon=True).start()

    def close(self) -> None:
        """Prefetch no more; what is being downloaded is finished."""
        self._wish = None

    def _path(self, file: RemoteFile, suffix: str = "") -> Path:
        return self._files / f"{file.sha256}{suffix}"

    def _bring(self, wish: _Wish) -> None:
        totals = itertools.accumulate(file.size for file in wish.files)
        fitting = [file for file, total in zip(wish.files, totals, strict=True) if total <= self.limit_bytes]
        for file in reversed(fitting):  # what is needed first is touched last, and so evicted last
            if found := _use(self._path(file), file.size):
                found.close()
        for file in fitting:
            if self._wish is not wish:
                return
            with contextlib.suppress(Exception):  # transfers fail in any way, and open() tries again
                with _locked(self._path(file, ".lock"), wait=False) as ours:  # if not, another process is bringing it
                    if ours and not self._path(file).exists() and (arrived := self._download(file, wish.asked_ns)):
                        arrived.close()

    def _download_or_free(self, file: RemoteFile) -> BinaryIO:
        try:
            arrived = self._download(file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with _locked(self._folder / "lock"):
                    kept = self._kept()
                    if not kept:
                        raise UserError(f"no space left on {self._folder} for {file.size} bytes: free some") from None
                    _evict(kept, file.size)
            raise
        assert arrived is not None  # with nothing spared there is always room for what fits the limit
        return arrived

    def _download(self, file: RemoteFile, evict_before_ns: float = math.inf) -> BinaryIO | None:
        """Bring a file whose lock is held; None if room for it takes evicting files used at that time or later."""
        # A name of its own: a transfer that was given up may still be writing to another.
        partial = self._path(file, f".{uuid.uuid4().hex}.partial")
        try:
            with _locked(self._folder / "lock"):
                if not self._make_room(file.size, evict_before_ns):
                    return None
            self._remote.download(file.name, partial)
            _verify(partial, file)
            with _locked(self._folder / "lock"):
                if not self._make_room(file.size, evict_before_ns):  # others took it in between
                    return None
                partial.rename(self._path(file))
                return _use(self._path(file), file.size)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, evict_before_ns: float) -> bool:
        kept = self._kept()
        return _evict(kept, sum(kept_size for _, kept_size, _ in kept) + size - self.limit_bytes, evict_before_ns)

    def _kept(self) -> list[tuple[int, int, Path]]:
        """When last used (ns), size and path of all whole files of the folder; what dead downloads left is removed."""
        kept = []
        for path in self._folder.glob("*/*"):
            # By such names alone, since the folder may have other users.
            match = re.fullmatch(r"[0-9a-f]{16}/([0-9a-f]{64})(\.[0-9a-f]{32}\.partial)?", path.relative_to(self._folder).as_posix())
            if match and match[2]:
                with _locked(path.with_name(f"{match[1]}.lock"), wait=False) as dead:
                    if dead:
                        path.unlink(missing_ok=True)
            elif match:
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        return kept


class _Remote:
    """What lies below a URL, in the face of failures."""

    def __init__(self, url: str, tries: int, backoff_seconds: float, stall_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.tries, self.backoff_seconds, self.stall_seconds = tries, backoff_seconds, stall_seconds
        self._given_url = url
        self._connections: dict[int, tuple[Any, str]] = {}
        # Connected once now, so that drivers are imported: a fork while another thread imports them would hang the child that does.
        self._connection()

    def download(self, name: str, target: Path) -> None:
        """One try at a file."""
        file_system, root = self._connection()
        self._watch(lambda: file_system.get_file(f"{root}/{name}", str(target)), lambda: _growth(target))

    def read(self, name: str) -> bytes:
        """One try at the content of a file that arrives before any progress could be seen."""
        file_system, root = self._connection()
        return self._watch(lambda: bytes(file_system.cat_file(f"{root}/{name}")), lambda: None)

    def persist(self, name: str, attempt: Callable[[], T]) -> T:
        """What the first good one of all tries gives.

        Raises:
            UserError: none was, or one failed in a way that another will not mend.
        """
        number = 1
        while True:
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:  # every driver has exceptions of its own: what is not known to be final may pass
                if number == self.tries or _is_final(error):
                    raise UserError(
                        f"cannot read {self.url}/{name}: {type(error).__name__}: {' '.join(str(error).split())} (try {number} of "
                        f"{self.tries}); see that this node reaches it and may read it, then run the same command again"
                    ) from error
            time.sleep(min(60.0, self.backoff_seconds * 2 ** (number - 1)) * _jitter.uniform(0.5, 1.5))
            number += 1

    def _connection(self) -> tuple[Any, str]:
        """This process's own file system, and the URL's path in it.

        That of the parent is not used in a forked child, where its threads do not run, but must be kept there: when finalized it closes
        its connections, and those are watched through an epoll descriptor which parent and child share.
        """
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, _connect(self._given_url, self.stall_seconds))
        return self._connections[process]

    def _watch(self, transfer: Callable[[], T], progress: Callable[[], object]) -> T:
        """Run a transfer in a thread that is left to itself, since nothing can end it, once ``progress`` has stood still for too long."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(transfer())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="transfer", daemon=True).start()
        last, moved = progress(), time.monotonic()
        while not concurrent.futures.wait([future], timeout=min(1.0, self.stall_seconds / 4)).done:
            if (now := progress()) != last:
                last, moved = now, time.monotonic()
            elif time.monotonic() - moved > self.stall_seconds:
                raise TimeoutError(f"nothing arrived for {self.stall_seconds:g} seconds")
        return future.result()


def _connect(url: str, stall_seconds: float) -> tuple[Any, str]:
    try:
        driver = fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except ImportError as error:
        raise UserError(f"cannot read {url}: {error} (with pip install)") from None
    except ValueError:
        raise UserError(f"cannot read {url}: it is of no kind that fsspec reads, such as s3://, gs://, hf:// or https://") from None
    options = {}
    if "https" in driver.protocol:
        from aiohttp import ClientTimeout

        # By default aiohttp ends every transfer after five minutes, however well it goes.
        options["timeout"] = ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    file_system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    return file_system, root.rstrip("/")


def _is_final(error: Exception) -> bool:
    """Whether the same transfer will fail again: the file is not there, or not for us."""
    status = getattr(error, "status", 0)  # aiohttp's
    return isinstance(error, (FileNotFoundError, PermissionError)) or (400 <= status < 500 and status not in _PASSING_STATUSES)


def _growth(path: Path) -> tuple[int, int] | None:
    """Changes while a file is written; blocks count too, because a file written in parts out of order may have its full size at once."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_blocks


def _verify(path: Path, file: RemoteFile) -> None:
    if (size := path.stat().st_size) != file.size:
        raise OSError(f"{size} bytes arrived, not {file.size}")
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
            raise OSError("what arrived fails its checksum")


def _use(path: Path, size: int) -> BinaryIO | None:
    """Open a file and note the use; None if it is not there, or torn."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    now = time.time_ns()  # finer than the clock that the system would stamp it with
    os.utime(file.fileno(), ns=(now, now))
    return file


def _evict(kept: list[tuple[int, int, Path]], excess: int, before_ns: float = math.inf) -> bool:
    """Remove that many bytes, least recently used first, of files last used before a time; whether that was enough."""
    for used_ns, size, path in sorted(kept):
        if excess <= 0 or used_ns >= before_ns:
            break
        path.unlink()
        excess -= size
    return excess <= 0


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, against threads as well; without ``wait``, yield whether it could be had."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # Closing would not do: a child forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
