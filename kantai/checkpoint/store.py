"""The checkpoints of a run directory: staged, published, verified and pruned, with fencing.

Fencing: every start of a run stages its checkpoints in a folder of its own, ``.attempt-000007``,
and takes those of earlier starts away. A node that was cut off may still compute while the job runs
elsewhere, but it can publish and prune nothing: the rename that would do it has lost its source.
All that this takes is a file system that agrees on renames, and on who made a file first.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kantai.errors import UserError
from kantai.storage.atomic import (
    MANIFEST,
    Damaged,
    fsync,
    publish,
    read_manifest,
    verify,
    write_manifest,
)

HELD_OUT_LOSS = "held_out_loss"  # in the manifest of a checkpoint that was scored


class CheckpointStore:
    """The checkpoints of a run directory, one folder a step: ``checkpoints/step-00001000``."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"
        self._run_dir = run_dir
        self._attempt: Path | None = None

    def supersede(self) -> None:
        """Begin an attempt; earlier ones can change nothing any more. For one process alone.

        Raises:
            UserError: there can be no folder of checkpoints.
        """
        if self._attempt is not None:
            return  # a folder that a later start has taken must not come back
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(
                f"{self.folder} is a file, or a link that leads nowhere: remove it, or make the "
                "folder that it leads to"
            ) from None
        while self._attempt is None:
            self._attempt = self._new_attempt()
        # The folder that is_superseded looks for goes first.
        for own in (self._attempt, self._beside):
            for earlier in own.parent.glob(".attempt-*"):
                if earlier.name < own.name:
                    taken = own / f"superseded-{earlier.name}"
                    with contextlib.suppress(FileNotFoundError):
                        earlier.rename(taken)
                        shutil.rmtree(taken, ignore_errors=True)

    def superseded(self) -> UserError:
        """Return the error of a start that a later one has superseded.

        ``slurm/pretrain.sbatch`` looks for its text in the logs, and then does not requeue.
        """
        return UserError(
            f"{self._run_dir} has been superseded by a later start of the run: this one ends"
        )

    @property
    def _beside(self) -> Path:
        """This start's folder beside the run's files: the checkpoints may lie on another disk."""
        assert self._attempt is not None, "supersede comes first"
        return self._run_dir / self._attempt.name

    def _new_attempt(self) -> Path | None:
        """A folder for this start; None where another start was quicker."""
        starts = self.folder / ".starts"  # a number each, which is never given twice
        starts.mkdir(exist_ok=True)
        numbers = [int(path.name) for path in starts.iterdir() if path.name.isdecimal()]
        number = 1 + max(numbers, default=0)
        try:
            (starts / f"{number:06d}").touch(exist_ok=False)
        except FileExistsError:
            return None
        attempt = self.folder / f".attempt-{number:06d}"
        beside = self._run_dir / attempt.name
        for folder in (beside, attempt):
            folder.mkdir(exist_ok=True)
        # A later start may have looked for earlier ones before these folders were there.
        if (starts / f"{number + 1:06d}").exists():
            for folder in (attempt, beside):
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return attempt

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
        """Put a checkpoint that was begun into its place; see :func:`publish`."""
        with self._fenced() as attempt:
            staged = attempt / self.path(step).name
            publish(staged, self.path(step), files, kind="checkpoint", step=step, **meta)

    @contextlib.contextmanager
    def replaced(self, path: Path) -> Iterator[Path]:
        """As :func:`replaced`, for a file that only the latest start of the run may change."""
        with self._fenced():
            partial = self._beside / path.name
            yield partial
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[Path]:
        """This start's own folder, through which all changes go, until a later start takes it."""
        assert self._attempt is not None, "supersede comes first"
        try:
            yield self._attempt
        except FileNotFoundError:
            if self.is_superseded():
                raise self.superseded() from None
            raise

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` steps."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        names = (path.name for path in self.folder.glob("step-*"))
        steps = {int(name[5:]): name for name in names if re.fullmatch(r"step-\d+", name)}
        return sorted(step for step, name in steps.items() if name == self.path(step).name)

    def verify(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint whose every byte is as it was written, and number finite.

        Raises:
            Damaged: it is not.
        """
        manifest = verify(self.path(step))
        _refuse_bad_numbers(self.path(step), manifest)
        return manifest

    def newest_valid(
        self,
        *,
        set_aside: bool = False,
        up_to: float = math.inf,
        verified: tuple[int, dict[str, Any]] | None = None,
    ) -> tuple[int, dict[str, Any]] | None:
        """Step and manifest of the newest checkpoint that a run can go on from.

        Its every byte is as it was written, and its every number is finite: a run that goes on
        from anything else skips every step.

        Args:
            set_aside: rename the damaged ones after it to ``damaged-...``; for the one process
                that may write.
            up_to: the last step that counts.
            verified: what this returned a moment ago. That checkpoint's bytes are not read again
                while its manifest is the same.
        """
        damaged = []
        steps = [step for step in self.steps() if step <= up_to]
        while steps:
            step = steps.pop()
            try:
                is_known = verified == (step, read_manifest(self.path(step)))
                manifest = verify(self.path(step), hashes=False) if is_known else self.verify(step)
            except Damaged as damage:
                if not self.path(step).exists():  # a start that is at work has pruned it
                    found = [step for step in self.steps() if step <= up_to]
                    steps = [step for step in found if step not in damaged]
                    continue
                print(f"checkpoint {step} is damaged and not used: {damage}", flush=True)
                damaged.append(step)
                continue
            if set_aside:
                self._set_aside(damaged)
            return step, manifest
        return None

    def recent(self, name: str, step: int) -> list[float]:
        """The last values of a metric before a checkpoint; none where its manifest has none."""
        recent = read_manifest(self.path(step)).get("recent")
        values = recent.get(name) if isinstance(recent, dict) else None
        if not isinstance(values, list):
            return []
        return [value for value in values if isinstance(value, float)]

    def score(self, step: int, held_out_loss: float) -> None:
        """Write the held-out loss of a published checkpoint into its manifest, if that is good."""
        with contextlib.suppress(Damaged), self._fenced() as attempt:
            manifest = read_manifest(self.path(step))
            partial = attempt / MANIFEST
            write_manifest(partial, **{**manifest, HELD_OUT_LOSS: held_out_loss})
            partial.replace(self.path(step) / MANIFEST)
            fsync(self.path(step))

    def scores(self) -> dict[int, float]:
        """Held-out losses by step, of the checkpoints that were scored."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                loss = read_manifest(self.path(step)).get(HELD_OUT_LOSS)
                if isinstance(loss, float):
                    scores[step] = loss
        return scores

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss; None where none was scored."""
        scores = self.scores()
        return min(scores, key=lambda step: (scores[step], -step), default=None)

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            with self._fenced() as attempt:
                aside = self.folder / f"damaged-{self.path(step).name}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(attempt / aside.name)
                (attempt / aside.name).rename(aside)

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints and the best. Verify the newest before."""
        best = self.best()
        self._remove([step for step in self.steps()[:-keep] if step != best])

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after a step: the run will do its steps anew, on other data."""
        self._remove([later for later in reversed(self.steps()) if later > step])

    def _remove(self, steps: list[int]) -> None:
        with self._fenced() as attempt:
            for step in steps:
                # Renamed first: a kill during the removal must not leave a checkpoint with files
                # missing under its name.
                pruned = attempt / f"pruned-{step}"
                self.path(step).rename(pruned)
                shutil.rmtree(pruned, ignore_errors=True)


def _refuse_bad_numbers(folder: Path, manifest: dict[str, Any]) -> None:
    """Look for an inf or a NaN in the tensors of a verified checkpoint.

    Raises:
        Damaged: there is one, or a file has gone meanwhile.
        UserError: the system cannot open a file, for example because too many are open.
    """
    for path in (folder / name for name in manifest["files"] if name.endswith(".safetensors")):
        try:
            found = _first_bad_tensor(path)
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        except (SafetensorError, TypeError, ValueError, AttributeError):
            continue  # no tensors of kantai's, which loading them will say
        if found is not None:
            raise Damaged(f"{path} has, in {found}, a number that is not finite")


def _first_bad_tensor(path: Path) -> str | None:
    with safe_open(path, framework="numpy") as file:
        bad = (name for name in file.keys() if not np.isfinite(file.get_tensor(name)).all())
        return next(bad, None)


def refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder with too little room. A quota shows only when a file is written."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        missing = needed_bytes - free
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and a checkpoint takes "
            f"{needed_bytes / 1e9:.1f}: free {missing / 1e9:.1f} GB more, or lower "
            "checkpoint.keep, and run the same command again"
        )
