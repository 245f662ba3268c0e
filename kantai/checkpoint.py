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
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kantai import UserError

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


def record(path: Path) -> dict[str, Any]:
    """Flush a file to the device and return its manifest entry, read back from what was written."""
    path.chmod(0o666 & ~_UMASK)  # safetensors makes files that the rest of a group cannot read
    _fsync(path)
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
        files = {path.relative_to(folder).as_posix(): record(path) for path in sorted(folder.rglob("*")) if path.is_file()}
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
    _fsync(manifest)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _fsync(inner)
    folder.rename(target)
    _fsync(target.parent)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place when the block ends well; others may be writing the same."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        _fsync(partial)
        partial.replace(path)
        _fsync(path.parent)
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
        _refuse_others(error)
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
            _refuse_others(error)
            size = -1
        if size < 0:
            raise Damaged(f"{path} is missing or unreadable")
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes, not {entry['bytes']}")
        if not is_whole:
            raise Damaged(f"{path} fails its checksum")
    return manifest


class CheckpointStore:
    """The checkpoints of a run directory, one folder an update: ``checkpoints/update-00001000``.

    Every start of a run stages its checkpoints in a folder of its own, ``.attempt-000007``, and takes those of earlier starts away. So a
    node that was cut off, and still computes while the job runs elsewhere, can publish and prune nothing: the rename that would do it has
    lost its source. A file system that agrees on renames, and on who made a file first, is all it takes.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"
        self._attempt: Path | None = None

    def take_over(self) -> None:
        """Begin an attempt; from here on, earlier ones can change nothing. For one process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        starts = self.folder / ".starts"  # a number each, which is never given twice
        starts.mkdir(exist_ok=True)
        while self._attempt is None:
            number = 1 + max((int(path.name) for path in starts.iterdir() if path.name.isdecimal()), default=0)
            with contextlib.suppress(FileExistsError):  # another start was quicker
                (starts / f"{number:06d}").touch(exist_ok=False)
                attempt = self.folder / f".attempt-{number:06d}"
                attempt.mkdir()
                # A later start may have looked for earlier ones before this folder was there.
                if (starts / f"{number + 1:06d}").exists():
                    shutil.rmtree(attempt, ignore_errors=True)
                else:
                    self._attempt = attempt
        for earlier in self.folder.glob(".attempt-*"):
            if earlier.name < self._attempt.name:
                with contextlib.suppress(FileNotFoundError):
                    earlier.rename(self._attempt / f"taken-{earlier.name}")
                    shutil.rmtree(self._attempt / f"taken-{earlier.name}", ignore_errors=True)

    def is_taken_over(self) -> bool:
        """Whether a later start of the run has begun."""
        return self._attempt is not None and not self._attempt.is_dir()

    def stage(self, update: int) -> Path:
        """An empty folder for the checkpoint after ``update`` updates."""
        with self._only_as_the_latest() as attempt:
            folder = attempt / self.path(update).name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

    def publish(self, update: int, files: dict[str, dict[str, Any]], **meta: Any) -> None:
        """Put the staged checkpoint into its place; see :func:`publish`."""
        with self._only_as_the_latest() as attempt:
            publish(attempt / self.path(update).name, self.path(update), files, kind="checkpoint", update=update, **meta)

    @contextlib.contextmanager
    def replaced(self, path: Path) -> Iterator[Path]:
        """As :func:`replaced`, for a file beside the checkpoints that only the latest start may change."""
        with self._only_as_the_latest() as attempt:
            partial = attempt / path.name
            yield partial
            _fsync(partial)
            partial.replace(path)
            _fsync(path.parent)

    @contextlib.contextmanager
    def _only_as_the_latest(self) -> Iterator[Path]:
        assert self._attempt is not None, "take_over comes first"
        try:
            yield self._attempt
        except FileNotFoundError:
            if self.is_taken_over():
                raise UserError(f"{self.folder.parent} has been taken over by a later start of the run: this one ends") from None
            raise

    def path(self, update: int) -> Path:
        """Where the checkpoint after ``update`` updates is."""
        return self.folder / f"update-{update:08d}"

    def updates(self) -> list[int]:
        """Update counts of the published checkpoints, oldest first."""
        found = (re.fullmatch(r"update-(\d+)", path.name) for path in self.folder.glob("update-*"))
        return sorted(int(match[1]) for match in found if match)

    def newest_valid(self, *, set_aside: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint whose every byte is as it was written, as (update, manifest); None when there is none.

        Args:
            set_aside: rename the damaged ones after it to ``damaged-...``, for the one process that may write.
        """
        damaged = []
        for update in reversed(self.updates()):
            try:
                manifest = verify(self.path(update))
            except Damaged as damage:
                print(f"checkpoint {update} is damaged and not used: {damage}", flush=True)
                damaged.append(update)
                continue
            for other in damaged if set_aside else []:
                with self._only_as_the_latest() as attempt:
                    aside = self.folder / f"damaged-{self.path(other).name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    self.path(other).rename(attempt / aside.name)
                    (attempt / aside.name).rename(aside)
            return update, manifest
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints. Call it after :func:`verify` of the newest."""
        with self._only_as_the_latest() as attempt:
            for update in self.updates()[:-keep]:
                # Renamed first: a kill in mid-removal must not leave a checkpoint with files missing under its name.
                pruned = attempt / f"pruned-{update}"
                self.path(update).rename(pruned)
                shutil.rmtree(pruned, ignore_errors=True)


def refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Look whether there is room before anything is written. What the system does not tell beforehand, a quota, writers find out.

    Raises:
        UserError: there is not; it says how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and a checkpoint takes {needed_bytes / 1e9:.1f}: free "
            f"{(needed_bytes - free) / 1e9:.1f} GB more, or lower checkpoint.keep, and run the same command again"
        )


def _refuse_others(error: OSError) -> None:
    """Raise what says nothing of a file's content: no rights, too many open files, a server that is away."""
    if error.errno not in (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise error


def _forget(path: Path) -> None:
    """Have the system drop a file's pages, so that it is read from where it was written to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
