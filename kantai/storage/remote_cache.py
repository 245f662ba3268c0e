"""Remote cache: remote files, fetched once a node, checked on arrival, evicted under a size limit.

All processes of a node share a folder, which must be local to the node::

    FOLDER/lock                            held while files appear or are evicted
    FOLDER/URL-DIGEST/SHA256               a whole file; its modification time is its last use
    FOLDER/URL-DIGEST/SHA256.lock          held by the one process that downloads the file
    FOLDER/URL-DIGEST/SHA256.ID.partial    a download, abandoned if nobody holds the lock

The locks are flocks: the kernel frees them when the process ends, however it ends. Nothing is
fsynced, since every file can be fetched again. A loss of power may cut a file short under its final
name. Every opening compares the size, and the first one of a process the hash.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import math
import os
import random
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
from filelock import FileLock, Timeout

from kantai.errors import UserError
from kantai.output import REDACTED, redact
from kantai.storage.atomic import sha256
from kantai.storage.network import http_options

T = TypeVar("T")
_PASSING_STATUSES = (408, 425, 429)  # HTTP's client errors that ask the client to try again
_jitter = random.SystemRandom()  # ranks that share random's seed would all retry at one moment


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote manifest. Manifests come from others and are not trusted.

    Raises:
        UserError: the name may lead out of the folder, or size or hash are impossible.
    """

    name: str  # path below the URL
    size: int  # bytes
    sha256: str  # hexadecimal digits

    def __post_init__(self) -> None:
        is_plain = re.fullmatch(r"[\w.=+ -]+(/[\w.=+ -]+)*", self.name)
        if not is_plain or not {".", ".."}.isdisjoint(self.name.split("/")):
            raise UserError(
                f"the manifest lists {self.name!r}, which is no plain path below it: "
                "see who wrote it"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.sha256) or self.size < 0:
            raise UserError(
                f"the manifest lists {self.name} with a size or SHA-256 that no file has: "
                "see who wrote it"
            )


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can open, or check that it is one.

    Below a temporary folder, whose names can be guessed, another user may have been there first.

    Raises:
        UserError: the folder is a link, or another user's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(
            f"{path} is a link, or belongs to another user: have it removed, or name a folder of "
            "your own, such as --data.cache_dir=/scratch/me"
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


class _KeptFile(NamedTuple):
    used_ns: int  # time of last use
    size: int
    path: Path


class _PrefetchRequest(NamedTuple):
    files: tuple[RemoteFile, ...]
    asked_ns: int


class Cache:
    """The files below a URL, read through a folder that all processes of this node share.

    The whole files in the folder, those of other URLs included, never exceed the limit. Downloads
    in progress come on top. Forked children may use the cache of their parent.

    Args:
        url: a URL that fsspec reads: ``s3://``, ``gs://``, ``hf://``, ``https://``, ... The
            environment or fsspec's configuration sets up its driver.
        folder: created if missing.
        limit_bytes: beyond this size, the least recently used files are evicted. A process that has
            an evicted file open or mapped keeps it; the system frees the bytes after the last user.
        tries: attempts at a transfer before it fails.
        backoff_seconds: mean wait after the first try. It doubles with each try, up to a minute.
            By default the waits add up to a minute.
        stall_seconds: a try fails if nothing arrives for this long.

    Raises:
        UserError: no installed driver reads such a URL.
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
        self._files = folder / hashlib.sha256(redact(self._remote.url).encode()).hexdigest()[:16]
        self._files.mkdir(parents=True, exist_ok=True)
        self._request: _PrefetchRequest | None = None
        self._hashed: set[tuple[str, int, int]] = set()  # hash, device and inode

    def open(self, file: RemoteFile) -> BinaryIO:
        """Open a whole, checked file, and download it first if the node does not have it.

        An open file stays readable when it is evicted.

        Raises:
            UserError: the file cannot be fetched, or is larger than the limit.
        """
        if file.size > self.limit_bytes:
            url = f"{self._remote.url}/{file.name}"
            raise UserError(
                f"{url} has {file.size} bytes, and the cache may hold {self.limit_bytes}: "
                "raise its limit"
            )
        found = self._open_checked(file)
        if found is not None:
            return found
        with FileLock(self._path(file, ".lock")):
            found = self._open_checked(file)  # the lock's last holder may have it
            if found is not None:
                return found
            return self._remote.retry(file.name, lambda: self._download_or_free(file))

    def read_small(self, name: str) -> bytes:
        """Read a small file, such as a manifest. It is not kept, since it may change."""
        return self._remote.retry(name, lambda: self._remote.read(name))

    def prefetch(self, wanted: Sequence[RemoteFile]) -> None:
        """Fetch files in this order from a background thread; this replaces earlier requests.

        The thread fetches as many of the first files as the limit holds, evicts nothing that was
        used or requested after this call, and skips files that fail: :meth:`open` will say why.
        """
        request = _PrefetchRequest(tuple(wanted), time.time_ns())
        self._request = request
        # One thread a request, not one that waits for requests: a forked child has none to repair.
        threading.Thread(
            target=self._fetch_ahead, args=(request,), name="prefetch", daemon=True
        ).start()

    def stop_prefetching(self) -> None:
        """Prefetch no more files, once the present download is finished."""
        self._request = None

    def _open_checked(self, file: RemoteFile) -> BinaryIO | None:
        """Open a kept file; None if it is missing, or its content is another.

        A process hashes a file when it first opens it: the disk may have lost bits since the
        download, and a folder that the user named may have other users.
        """
        opened = _open_kept(self._path(file), file.size)
        if opened is None or _identity(opened, file) in self._hashed:
            return opened
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            opened.close()
            return None
        opened.seek(0)
        self._hashed.add(_identity(opened, file))
        return opened

    def _path(self, file: RemoteFile, suffix: str = "") -> Path:
        return self._files / f"{file.sha256}{suffix}"

    def _fetch_ahead(self, request: _PrefetchRequest) -> None:
        totals = itertools.accumulate(file.size for file in request.files)
        sizes = zip(request.files, totals, strict=True)
        fitting = [file for file, total in sizes if total <= self.limit_bytes]
        for file in reversed(fitting):  # the file needed first is used last, and so evicted last
            found = _open_kept(self._path(file), file.size)
            if found is not None:
                found.close()
        for file in fitting:
            if self._request is not request:
                return
            # Any failure is left to open(), which tries again. Timeout: another process fetches it.
            with (
                contextlib.suppress(Exception),
                FileLock(self._path(file, ".lock"), blocking=False),
            ):
                if not self._path(file).exists():
                    arrived = self._download(file, request.asked_ns)
                    if arrived is not None:
                        arrived.close()

    def _download_or_free(self, file: RemoteFile) -> BinaryIO:
        try:
            arrived = self._download(file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with FileLock(self._folder / "lock"):
                    kept = self._kept()
                    if not kept:
                        raise UserError(
                            f"no space left on {self._folder} for {file.size} bytes: free some"
                        ) from None
                    _evict(kept, file.size)
            raise
        assert arrived is not None  # all kept files may be evicted, and the file fits the limit
        return arrived

    def _download(self, file: RemoteFile, evict_before_ns: float = math.inf) -> BinaryIO | None:
        """Download a file whose lock is held.

        Returns:
            The opened file; None if room for it needs files evicted that were used at
            ``evict_before_ns`` or later.
        """
        # Each try has a name of its own: an abandoned transfer may still be writing to another.
        partial = self._path(file, f".{uuid.uuid4().hex}.partial")
        try:
            with FileLock(self._folder / "lock"):
                if not self._make_room(file.size, evict_before_ns):
                    return None
            self._remote.download(file.name, partial)
            _verify(partial, file)
            with FileLock(self._folder / "lock"):
                # Others may have taken the room in between.
                if not self._make_room(file.size, evict_before_ns):
                    return None
                partial.rename(self._path(file))
                arrived = _open_kept(self._path(file), file.size)
                if arrived is not None:
                    self._hashed.add(_identity(arrived, file))
                return arrived
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, evict_before_ns: float) -> bool:
        kept = self._kept()
        excess = sum(other.size for other in kept) + size - self.limit_bytes
        return _evict(kept, excess, evict_before_ns)

    def _kept(self) -> list[_KeptFile]:
        """All whole files of the folder; abandoned downloads are removed."""
        kept = []
        # Only names that this class gives: the folder may have other users.
        pattern = re.compile(r"[0-9a-f]{16}/([0-9a-f]{64})(\.[0-9a-f]{32}\.partial)?")
        for path in self._folder.glob("*/*"):
            match = pattern.fullmatch(path.relative_to(self._folder).as_posix())
            if match and match[2]:
                lock = FileLock(path.with_name(f"{match[1]}.lock"), blocking=False)
                with contextlib.suppress(Timeout), lock:
                    path.unlink(missing_ok=True)
            elif match:
                status = path.stat()
                kept.append(_KeptFile(status.st_mtime_ns, status.st_size, path))
        return kept


class _Remote:
    """The files below a URL, with retries."""

    def __init__(self, url: str, tries: int, backoff_seconds: float, stall_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.tries = tries
        self.backoff_seconds = backoff_seconds
        self.stall_seconds = stall_seconds
        self._given_url = url
        self._connections: dict[int, tuple[Any, str]] = {}
        # Import the drivers now: a fork while another thread imports them would hang the child.
        self._connection()

    def download(self, name: str, target: Path) -> None:
        """Try once to download a file."""
        file_system, root = self._connection()
        self._run_watched(
            lambda: file_system.get_file(f"{root}/{name}", str(target)), lambda: _growth(target)
        )

    def read(self, name: str) -> bytes:
        """Try once to read a file, one too small to show progress."""
        file_system, root = self._connection()
        return self._run_watched(
            lambda: bytes(file_system.cat_file(f"{root}/{name}")), lambda: None
        )

    def retry(self, name: str, attempt: Callable[[], T]) -> T:
        """Return the result of ``attempt`` once it succeeds; give up after ``tries`` failures."""
        number = 1
        while True:
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:  # each driver has its own: retry unless known to be final
                if number == self.tries or _is_final(error):
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    raise UserError(
                        f"cannot read {self.url}/{name}: {reason} (try {number} of {self.tries}); "
                        "see that this node reaches it and may read it, "
                        "then run the same command again"
                    ) from error
            wait = min(60.0, self.backoff_seconds * 2 ** (number - 1))
            time.sleep(wait * _jitter.uniform(0.5, 1.5))
            number += 1

    def _connection(self) -> tuple[Any, str]:
        """This process's own file system, and the URL's path in it.

        A forked child does not use its parent's, whose threads do not run there, but must keep it:
        its finalizer closes connections that are watched through an epoll descriptor, which parent
        and child share.
        """
        process = os.getpid()
        if process not in self._connections:
            connection = _connect(self._given_url, self.stall_seconds)
            self._connections.setdefault(process, connection)
        return self._connections[process]

    def _run_watched(self, transfer: Callable[[], T], progress: Callable[[], object]) -> T:
        """Run a transfer in a thread.

        The thread is abandoned, since nothing can end it, once ``progress`` returns the same value
        for too long.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(transfer())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="transfer", daemon=True).start()
        last = progress()
        moved_at = time.monotonic()
        while not concurrent.futures.wait([future], timeout=min(1.0, self.stall_seconds / 4)).done:
            now = progress()
            if now != last:
                last = now
                moved_at = time.monotonic()
            elif time.monotonic() - moved_at > self.stall_seconds:
                raise TimeoutError(f"nothing arrived for {self.stall_seconds:g} seconds")
        return future.result()


def _connect(url: str, stall_seconds: float) -> tuple[Any, str]:
    if REDACTED in url:
        raise UserError(
            f"cannot read {url}: a run records no passwords and tokens; give the whole URL again, "
            "as by --data.shards=..., or name one without a password"
        )
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except ImportError as error:
        raise UserError(f"cannot read {url}: {error} (with pip install)") from None
    except ValueError:
        raise UserError(
            f"cannot read {url}: it is of no kind that fsspec reads, "
            "such as s3://, gs://, hf:// or https://"
        ) from None
    options = http_options(url, stall_seconds)
    file_system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    return file_system, root.rstrip("/")


def _is_final(error: Exception) -> bool:
    """Whether the same transfer will fail again: the file is missing, or access is denied."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return True
    status = getattr(error, "status", 0)  # aiohttp's
    return 400 <= status < 500 and status not in _PASSING_STATUSES


def _growth(path: Path) -> tuple[int, int] | None:
    """A value that changes while a file is written.

    It counts blocks too: a file written in parts out of order may have its full size at once.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_blocks


def _verify(path: Path, file: RemoteFile) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise OSError(f"{size} bytes arrived, not {file.size}")
    if sha256(path) != file.sha256:
        raise OSError("what arrived fails its checksum")


def _open_kept(path: Path, size: int) -> BufferedReader | None:
    """Open a kept file and set its time of last use; None if it is missing, cut short or a link."""
    try:
        file = open(path, "rb", opener=_open_no_link)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    now = time.time_ns()  # finer than the clock of the system's own time stamps
    os.utime(file.fileno(), ns=(now, now))
    return file


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _identity(opened: BinaryIO, file: RemoteFile) -> tuple[str, int, int]:
    status = os.fstat(opened.fileno())
    return file.sha256, status.st_dev, status.st_ino


def _evict(kept: list[_KeptFile], excess: int, before_ns: float = math.inf) -> bool:
    """Remove the least recently used files until ``excess`` bytes are gone.

    Return whether that was possible without files last used at ``before_ns`` or later.
    """
    for file in sorted(kept):
        if excess <= 0 or file.used_ns >= before_ns:
            break
        file.path.unlink()
        excess -= file.size
    return excess <= 0
