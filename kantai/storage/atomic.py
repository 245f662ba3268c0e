"""Atomic files and folders: each exists whole and verified, or not at all.

Tokenizers, shards, checkpoints and exports are staged in a folder beside their place, fsynced,
listed with sizes and SHA-256 in ``manifest.json``, and renamed into place. A process killed at any
instruction leaves the old state and a hidden ``.NAME.partial``, which the next attempt removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kantai.errors import PASSING_ERRORS, UserError
from kantai.output import redact_all

T = TypeVar("T")

MANIFEST = "manifest.json"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*:$|hub:)", re.IGNORECASE)
_PAUSES_SECONDS = (0.1, 1.0, 5.0)
# A file server frees the locks of a dead node when their lease ends, 90 s after its last sign.
_LOCK_WAIT_SECONDS = 120.0
_LOCK_NOTICE_SECONDS = 3.0
_LOCK_POLL_SECONDS = 0.3


class Damaged(Exception):
    """A folder differs from its manifest; the message names the file and the difference."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can write, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Fsync a file and return its manifest entry, read back from the device.

    The file gets the rights of its folder, which ``mkdir`` gave as the umask says: safetensors
    makes files that the rest of a group cannot read.
    """
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync(path)
    _drop_cached_pages(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def staged(target: Path, **meta: Any) -> Iterator[Path]:
    """Yield an empty folder; publish it as ``target`` if the block succeeds, else remove it.

    Args:
        meta: entries of the manifest beside the list of files. The block may still fill a dict
            that is given here.

    Raises:
        UserError: ``target`` exists already, or is a URL, or another process is writing it.
    """
    check_output(target)
    target = target.absolute()
    with locked(target):
        check_output(target)  # another process may have published it meanwhile
        folder = begin(target)
        try:
            yield folder
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): manifest_entry(path) for path in paths}
            publish(folder, target, files, **meta)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def refuse_url(target: Path) -> None:
    """Refuse to write to a URL: a path takes ``s3://bucket/x`` for a local folder ``s3:``.

    Raises:
        UserError: the target is a URL.
    """
    scheme = target.parts[0] if target.parts else ""
    if _SCHEME.match(scheme):
        rest = "/".join(target.parts[1:])
        url = f"{scheme}//{rest}" if scheme.endswith(":") else str(target)
        raise UserError(f"{url} is a URL: write to a local folder, and copy that there")


def check_output(target: Path) -> None:
    """Refuse to write to a URL, or over something.

    Raises:
        UserError: the target is a URL, or exists.
    """
    refuse_url(target)
    if target.exists():
        raise UserError(f"{target.absolute()} exists already; remove it or choose another output")


@contextlib.contextmanager
def locked(target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an output, so that no other process writes it at the same time.

    The lock is that of the file ``.NAME.lock`` beside it. The system releases it when the process
    ends, however it ends. A file system without locks gives none. While another process holds the
    lock, it is asked for again for two minutes: a file server knows late that a node has died, and
    the last of several that share the lock holds it alone for a moment.

    Args:
        shared: others may hold it too, if they share it as well.

    Raises:
        UserError: another process keeps it.
    """
    target = target.absolute()
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is writing {target}"
    descriptor = _lock_patiently(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, busy)
    if descriptor is None:
        raise UserError(f"{busy}: wait for it, or choose another output")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # others that share it may still need its file
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _lock_patiently(path: Path, kind: int, busy: str) -> int | None:
    """Return as _lock does, but ask again for a while. Say ``busy`` once, for who waits."""
    began = time.monotonic()
    has_said = False
    while True:
        descriptor = _lock(path, kind)
        waited = time.monotonic() - began
        if descriptor is not None or waited >= _LOCK_WAIT_SECONDS:
            return descriptor
        if waited >= _LOCK_NOTICE_SECONDS and not has_said:
            print(f"{busy}: waiting {_LOCK_WAIT_SECONDS:.0f} seconds for it at most", flush=True)
            has_said = True
        time.sleep(_LOCK_POLL_SECONDS)


def _lock(path: Path, kind: int) -> int | None:
    """Return the descriptor of a locked file; None if another process holds its lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # the file system has no locks
            return descriptor
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder has removed the file in the meantime


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def begin(target: Path) -> Path:
    """Make an empty staging folder for ``target``, and remove that of a killed attempt."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, target: Path, files: dict[str, dict[str, Any]], **meta: Any) -> None:
    """Seal a staging folder whose files are fsynced with a manifest; rename it to ``target``."""
    write_manifest(folder / MANIFEST, files, **meta)
    fsync(folder)
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync(path)
    folder.rename(target)
    fsync(target.parent)


def write_manifest(path: Path, files: dict[str, dict[str, Any]], **meta: Any) -> None:
    """Write a manifest and fsync it. Secrets in its entries are redacted."""
    content = {**redact_all(meta), "files": files}
    sealed = {**content, "digest": digest(content)}
    path.write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    fsync(path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; it replaces ``path`` if the block succeeds.

    Several processes may replace the same file at once: each writes to a name of its own.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder.

    Raises:
        Damaged: the manifest is missing, or :func:`publish` did not write it so.
    """
    try:
        content = _patiently((folder / MANIFEST).read_bytes)
    except OSError as error:
        _raise_unless_damaged(error)
        raise Damaged(f"{folder / MANIFEST} is missing or unreadable") from None
    return parse_manifest(content, str(folder / MANIFEST))


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """A manifest from its bytes.

    Raises:
        Damaged: :func:`publish` did not write it so.
    """
    try:
        manifest = json.loads(content)
        files = manifest["files"]
        if manifest.pop("digest") != digest(manifest):
            raise ValueError
        for path, entry in files.items():
            types = {key: type(value) for key, value in entry.items()}
            if types != {"bytes": int, "sha256": str} or ".." in Path(path).parts:
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{name} is missing or unreadable") from None
    return dict(manifest)


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare a folder with its manifest and return the manifest.

    Args:
        hashes: compare every byte; otherwise only names and sizes.

    Raises:
        Damaged: a file is missing, or its size or content differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        _verify_file(folder / name, entry, hashes=hashes)
    return manifest


def _verify_file(path: Path, entry: dict[str, Any], *, hashes: bool) -> None:
    missing = Damaged(f"{path} is missing or unreadable")
    try:
        if path.is_dir():
            raise missing
        size = _patiently(path.stat).st_size
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes, not {entry['bytes']}")
        if hashes and _patiently(lambda: sha256(path)) != entry["sha256"]:
            raise Damaged(f"{path} fails its checksum")
    except OSError as error:
        _raise_unless_damaged(error)
        raise missing from None


def _patiently(read: Callable[[], T]) -> T:
    """What a read returns. It is tried again after errors of a disk or a server that may pass."""
    for seconds in _PAUSES_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
        time.sleep(seconds)
    return read()


def _raise_unless_damaged(error: OSError) -> None:
    """Raise errors that say nothing of a file's content: rights, too many open files, no server."""
    if error.errno not in (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise error


def _drop_cached_pages(path: Path) -> None:
    """Drop a file's pages from the system's cache, so that the next read comes from the device."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync(path: Path) -> None:
    """Flush a file or folder to its device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
