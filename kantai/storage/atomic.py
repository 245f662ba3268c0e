"""Which states are complete? Folders that exist whole and verified, or not at all.

Everything kantai writes (tokenizers, shards, checkpoints, exports) is staged beside its place, fsynced, listed with sizes and
SHA-256 in ``manifest.json``, and renamed into place. A process killed at any instruction leaves the old state and a hidden
``.NAME.partial``, which the next attempt removes.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kantai.errors import UserError

MANIFEST = "manifest.json"
_UMASK = os.umask(0o077)  # which can be read by setting it only
os.umask(_UMASK)


class Damaged(Exception):
    """A folder that is not what its manifest says; the message names the file and the difference."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of anything JSON can write, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Flush a file to the device and return its manifest entry, read back from what was written."""
    path.chmod(0o666 & ~_UMASK)  # safetensors makes files that the rest of a group cannot read
    fsync(path)
    _forget(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def staged(target: Path, **meta: Any) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, seal it and rename it to ``target``, else remove it.

    Args:
        target: where the folder is to appear, whole.
        meta: goes into its manifest beside the list of files. A dict given here may be filled until the block ends.

    Raises:
        UserError: ``target`` exists already.
    """
    target = target.absolute()
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another output")
    folder = begin(target)
    try:
        yield folder
        files = {path.relative_to(folder).as_posix(): manifest_entry(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        publish(folder, target, files, **meta)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def begin(target: Path) -> Path:
    """An empty staging folder for ``target``; what a killed attempt left there is removed."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, target: Path, files: dict[str, dict[str, Any]], **meta: Any) -> None:
    """Write the manifest into a staging folder whose files are on the device, last, and rename it to its place."""
    manifest, content = folder / MANIFEST, {**meta, "files": files}
    manifest.write_text(json.dumps({**content, "digest": digest(content)}, indent=1) + "\n", encoding="utf-8")
    fsync(manifest)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        fsync(inner)
    folder.rename(target)
    fsync(target.parent)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place when the block ends well; others may be writing the same."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder.

    Raises:
        Damaged: it is missing or not what :func:`publish` writes.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        _raise_unless_damage(error)
        raise Damaged(f"{folder / MANIFEST} is missing or unreadable") from None
    return parse_manifest(content, str(folder / MANIFEST))


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """A manifest from its bytes.

    Raises:
        Damaged: it is not what :func:`publish` writes.
    """
    try:
        manifest = json.loads(content)
        files = manifest["files"]
        if manifest.pop("digest") != digest(manifest):
            raise ValueError
        for path, entry in files.items():
            if {key: type(value) for key, value in entry.items()} != {"bytes": int, "sha256": str} or ".." in Path(path).parts:
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{name} is missing or unreadable") from None
    return dict(manifest)


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare a folder with its manifest and return that; without ``hashes``, only names and sizes.

    Raises:
        Damaged: a file is missing, has another size or other bytes.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            size = -1 if path.is_dir() else path.stat().st_size
            is_whole = size == entry["bytes"] and (not hashes or sha256(path) == entry["sha256"])
        except OSError as error:
            _raise_unless_damage(error)
            size = -1
        if size < 0:
            raise Damaged(f"{path} is missing or unreadable")
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes, not {entry['bytes']}")
        if not is_whole:
            raise Damaged(f"{path} fails its checksum")
    return manifest


def _raise_unless_damage(error: OSError) -> None:
    """Raise what says nothing of a file's content: no rights, too many open files, a server that is away."""
    if error.errno not in (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise error


def _forget(path: Path) -> None:
    """Have the system drop a file's pages, so that it is read from where it was written to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
