"""The checkpoints of a run directory: staged, published, verified and pruned, with fencing against earlier starts."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kantai.errors import UserError
from kantai.storage.atomic import Damaged, fsync, publish, verify


class CheckpointStore:
    """The checkpoints of a run directory, one folder a step: ``checkpoints/step-00001000``.

    Every start of a run stages its checkpoints in a folder of its own, ``.attempt-000007``, and takes those of earlier starts away. So a
    node that was cut off, and still computes while the job runs elsewhere, can publish and prune nothing: the rename that would do it has
    lost its source. A file system that agrees on renames, and on who made a file first, is all it takes.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"
        self._attempt: Path | None = None

    def supersede(self) -> None:
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
                    earlier.rename(self._attempt / f"superseded-{earlier.name}")
                    shutil.rmtree(self._attempt / f"superseded-{earlier.name}", ignore_errors=True)

    def is_superseded(self) -> bool:
        """Whether a later start of the run has begun."""
        return self._attempt is not None and not self._attempt.is_dir()

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint after ``step`` steps."""
        with self._fenced() as attempt:
            folder = attempt / self.path(step).name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

    def publish(self, step: int, files: dict[str, dict[str, Any]], **meta: Any) -> None:
        """Put the staged checkpoint into its place; see :func:`publish`."""
        with self._fenced() as attempt:
            publish(
                attempt / self.path(step).name,
                self.path(step),
                files,
                kind="checkpoint",
                step=step,
                **meta,
            )

    @contextlib.contextmanager
    def replaced(self, path: Path) -> Iterator[Path]:
        """As :func:`replaced`, for a file beside the checkpoints that only the latest start may change."""
        with self._fenced() as attempt:
            partial = attempt / path.name
            yield partial
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[Path]:
        assert self._attempt is not None, "supersede comes first"
        try:
            yield self._attempt
        except FileNotFoundError:
            if self.is_superseded():
                raise UserError(f"{self.folder.parent} has been superseded by a later start of the run: this one ends") from None
            raise

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Step counts of the published checkpoints, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def newest_valid(self, *, set_aside: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint whose every byte is as it was written, as (step, manifest); None when there is none.

        Args:
            set_aside: rename the damaged ones after it to ``damaged-...``, for the one process that may write.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                manifest = verify(self.path(step))
            except Damaged as damage:
                print(f"checkpoint {step} is damaged and not used: {damage}", flush=True)
                damaged.append(step)
                continue
            for other in damaged if set_aside else []:
                with self._fenced() as attempt:
                    aside = self.folder / f"damaged-{self.path(other).name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    self.path(other).rename(attempt / aside.name)
                    (attempt / aside.name).rename(aside)
            return step, manifest
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints. Call it after :func:`verify` of the newest."""
        with self._fenced() as attempt:
            for step in self.steps()[:-keep]:
                # Renamed first: a kill in mid-removal must not leave a checkpoint with files missing under its name.
                pruned = attempt / f"pruned-{step}"
                self.path(step).rename(pruned)
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
