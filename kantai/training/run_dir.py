"""A run directory: the config and data that it belongs to, and how far the run has come.

Looking at one imports no torch, so it takes a second.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kantai
from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import (
    as_begun,
    as_written,
    changeable_settings,
    default_settings,
    fixed_settings,
    flat_settings,
    load_config,
    read_run_dir,
    read_settings,
    refuse_other_run,
    save_config,
)
from kantai.config.schema import MAY_CHANGE_WITHOUT_DROPOUT, Config
from kantai.data.dataset import Data, open_data, stream_version
from kantai.errors import UserError
from kantai.optim.schedule import check_schedule
from kantai.storage.atomic import Damaged, digest, refuse_url, sha256
from kantai.training.skipped_data import SkippedData

CONFIG_FILE = "config.yaml"
VERSION_FILE = "version.json"
PROMPTS_FILE = "prompts.txt"
FORMAT = 2  # of run directories: the names of their files and of what is in them
_DATA_KEYS = ("shards", "tokenizer")  # of the lineage
_LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True)
class RunDir:
    """A run directory that fits its config and data."""

    path: Path
    config: Config
    data: Data
    config_file: Path | None = None  # which the config came from

    @cached_property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.path)

    def is_finished(self) -> bool:
        """Whether the last step's checkpoint is there, whole."""
        last = self.data.max_steps
        return self.store.steps()[-1:] == [last] and self.newest() == last

    def newest(self, *, set_aside: bool = False, up_to: float = math.inf) -> int:
        """Step of the newest valid checkpoint, 0 where there is none.

        Args:
            set_aside: move damaged ones out of the way; for one process alone.
            up_to: the last step that counts.

        Raises:
            UserError: it belongs to other settings, shards or another tokenizer; or there are
                checkpoints, and all of them are damaged.
        """
        return self._check_newest(self.store.newest_valid(set_aside=set_aside, up_to=up_to), up_to)

    def _check_newest(
        self, found: tuple[int, dict[str, Any]] | None, up_to: float = math.inf
    ) -> int:
        """Step of the checkpoint that was found to be the newest valid; see :meth:`newest`."""
        if found is not None:
            step, manifest = found
            self._check_lineage(step, manifest.get("lineage"))
            return step
        damaged = [step for step in self.store.steps() if step <= up_to]
        if damaged:
            raise UserError(
                f"all of the {len(damaged)} checkpoints in {self.store.folder} are damaged: bring "
                "one back from a copy, or remove that folder to begin with step 0"
            )
        begun_with = _read_version(self.path)
        if begun_with.keys() >= set(_DATA_KEYS):  # it may have steps that are not saved yet
            self._check_data(self.path, begun_with)
        return 0

    def take_over(self) -> int:
        """Make this start the only one that may write. For one process alone.

        Returns:
            The step of the newest valid checkpoint.

        Raises:
            UserError: the run belongs to other settings or data. It is as it was, and a start that
                is at work goes on.
        """
        self.refuse_other_run()  # a start that is refused must not end the one that runs
        found = self.store.newest_valid()
        self._check_newest(found)
        self.store.supersede()
        # Another start may have begun or gone on meanwhile. From here on, none can write.
        self.refuse_other_run()
        found = self.store.newest_valid(set_aside=True, verified=found)
        newest = self._check_newest(found)
        self._write()
        return newest

    def choose(self, step: int | None = None, *, best: bool = False) -> int:
        """Step of a valid checkpoint: of ``step``, or the best, or the newest.

        Raises:
            UserError: it is not there, or damaged, or of other settings or data.
        """
        if best:
            step = self.store.best()
            if step is None:
                raise UserError(
                    f"no checkpoint in {self.store.folder} was scored: a run scores those that it "
                    "saves at an evaluation (checkpoint.every_steps: a multiple of "
                    "evaluation.every_steps); or choose with --step"
                )
        if step is None:
            newest = self.newest()
            if newest == 0:
                raise UserError(
                    f"{self.path} has no valid checkpoint yet: run pretrain.py until it saves one"
                )
            return newest
        try:
            manifest = self.store.verify(step)
        except Damaged as damage:
            if self.store.path(step).exists():
                raise UserError(
                    f"checkpoint {step} is damaged: {damage}; choose another with --step"
                ) from None
            if best:  # a start that is at work has a better one, and has removed this one
                return self.choose(best=True)
            steps = ", ".join(map(str, self.store.steps())) or "none"
            raise UserError(
                f"{self.store.folder} has no checkpoint of step {step}; it has {steps}"
            ) from None
        self._check_lineage(step, manifest.get("lineage"))
        return step

    def refuse_other_run(self) -> None:
        """Refuse a run in the directory that is of another release or has other settings."""
        if (self.path / CONFIG_FILE).exists():
            check_version(self.path)
            refuse_other_run(self.config, _begun_with(self.path, self.config))

    def create(self) -> None:
        """Make the directory with its config and prompts; for one process alone."""
        self.store.supersede()
        self._write()

    def _write(self) -> None:
        # The config comes first: it is what makes a folder a run directory.
        with self.store.replaced(self.path / CONFIG_FILE) as partial:
            save_config(self.config, partial)
        begun_with = {key: self.lineage[key] for key in _DATA_KEYS}
        if self.config_file is not None:
            begun_with["config_file"] = str(self.config_file)
        save_version(self.path, self.store, begun_with)
        prompts = (" ".join(prompt.split()) for prompt in self.data.prompts)
        text = "".join(f"{prompt}\n" for prompt in prompts)
        with self.store.replaced(self.path / PROMPTS_FILE) as partial:
            partial.write_text(text, encoding="utf-8")
        (self.path / "stacks").mkdir(exist_ok=True)

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """Everything that decides the result, for checkpoints and the model card."""
        sources = sorted(Path(kantai.__file__).parent.rglob("*.py"))
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        settings = fixed_settings(self.config)
        return {
            "settings": settings,
            "config": digest(settings),
            "shards": digest(self.data.shards.manifest["files"]),
            "tokenizer": self.data.vocabulary.fingerprint,
            "code": digest([sha256(path) for path in sources]),
            "versions": {
                "python": platform.python_version(),
                **versions,
                "kantai": kantai.__version__,
            },
        }

    @property
    def in_common(self) -> dict[str, Any]:
        """What all ranks of a start must have alike, by name.

        A node may keep shards and tokenizer in folders of its own, and read them in its own way.
        """
        lineage = self.lineage
        settings = flat_settings(self.config)
        of_node = {key for key in settings if key.startswith("data.")} - lineage["settings"].keys()
        libraries = {f"version of {name}": lineage["versions"][name] for name in _LIBRARIES}
        return {
            **{key: value for key, value in settings.items() if key not in of_node},
            **libraries,
            "digest of data.shards": lineage["shards"],
            "digest of data.tokenizer": lineage["tokenizer"],
            "digest of kantai's code": lineage["code"],
        }

    def _check_data(self, made_by: Path, theirs: dict[str, Any]) -> None:
        is_same = {
            "shards": theirs.get("shards") == self.lineage["shards"],
            "tokenizer": self.data.vocabulary.has_fingerprint(theirs.get("tokenizer")),
        }
        for key in _DATA_KEYS:
            if not is_same[key]:
                raise UserError(
                    f"{made_by} was trained on other {key} than "
                    f"{getattr(self.config.data, key)}: name those of its start"
                )

    def _check_lineage(self, step: int, lineage: Any) -> None:
        theirs = lineage if isinstance(lineage, dict) else {}
        checkpoint = self.store.path(step)
        self._check_settings(checkpoint, theirs.get("settings"))
        self._check_data(checkpoint, theirs)
        known = SkippedData.of(self.path)
        skipped = theirs.get("skipped_data", [])
        windows = {str(list(window)) for window in known.windows}
        if not isinstance(skipped, list) or not windows >= set(map(str, skipped)):
            raise UserError(
                f"{known.path} lacks what checkpoint {step} says of data that was skipped: bring "
                "it back from a copy"
            )

    def _check_settings(self, checkpoint: Path, theirs: Any) -> None:
        """Compare settings key by key. A setting that a later release added had its default."""
        if not isinstance(theirs, dict):
            raise UserError(f"{checkpoint} does not say with which settings it was made")
        ours = self.lineage["settings"]
        defaults = default_settings()
        known = flat_settings(self.config)
        # What an earlier release did not hold to be fixed, its checkpoints do not say.
        unsaid = changeable_settings(MAY_CHANGE_WITHOUT_DROPOUT) - theirs.keys()
        for key in sorted((ours.keys() | theirs.keys()) - unsaid):
            if key in known and key not in ours:
                continue  # an earlier release held it to be fixed
            if key not in ours:
                raise UserError(
                    f"{checkpoint} was made with {key}, which this release does not know"
                )
            before = theirs.get(key, defaults.get(key))
            if before != ours[key]:
                raise UserError(
                    f"{checkpoint} was made with {key} {as_written(before)}, and "
                    f"{self.path / CONFIG_FILE} says {as_written(ours[key])}: bring that back to "
                    "what it was"
                )


def load_run_config(
    path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> Config:
    """Load a config; what it leaves out is as the run recorded it, if the run has begun.

    So a default may change in a later release, and a run goes on as it began. It also does so if
    the file that it began with has been edited since, even into one that cannot be read: a job in a
    queue has no one to ask. A run directory of another release is refused.

    Args:
        say: told each edit that is not taken up.

    Raises:
        UserError: see :func:`load_config`; the overrides are at fault, or the run did not begin
            with the file.
    """
    run_dir = read_run_dir(path, overrides)
    if run_dir is None:
        return load_config(path, overrides)
    recorded = Path(run_dir).expanduser() / CONFIG_FILE
    if not recorded.is_file():
        return load_config(path, overrides)
    check_version(recorded.parent)
    begun = load_config(recorded)
    is_origin = _is_origin(path, recorded.parent)
    try:
        config = load_config(path, overrides, begun)
    except UserError as error:
        if not is_origin:
            raise
        config = _as_recorded(recorded, overrides, error)
        fault = " ".join(str(error).split())
        say(f"note: {fault}. This run goes on with {recorded} and the overrides alone")
        return config
    if not is_origin:
        return config
    config, edits = as_begun(config, _begun_with(recorded.parent, config), overrides)
    for key, (now, before) in edits.items():
        say(
            f"note: {path} says {key} {as_written(now)} now. This run goes on with "
            f"{as_written(before)}, as it began; give a new --run_dir=... to train with the new one"
        )
    return config


def _is_origin(path: str | Path, run_dir: Path) -> bool:
    """Whether a run began with a config file, by whichever spelling or link it is named."""
    origin = _read_version(run_dir).get("config_file")
    return isinstance(origin, str) and os.path.realpath(origin) == os.path.realpath(path)


def _as_recorded(recorded: Path, overrides: Sequence[str], error: UserError) -> Config:
    """The settings of a run whose config file cannot be read as it is now.

    Raises:
        UserError: the overrides are at fault, as ``error`` says.
    """
    moved = f"--run_dir={recorded.parent}"  # the directory may have been moved since
    try:
        return load_config(recorded, [moved, *overrides])
    except UserError:
        raise error from None


def open_run_dir(
    config: Config, data: Data, *, resume: bool = True, config_file: str | Path | None = None
) -> RunDir:
    """Look whether a run may start or go on in its directory; writes nothing.

    Args:
        resume: go on where there is something to go on from.
        config_file: which the config came from.

    Raises:
        UserError: the directory is another run's, or no run's, or of another release, or there is
            a run and ``resume`` is not wanted.
    """
    check_schedule(config.optimizer, data.max_steps)
    path = Path(config.run_dir)
    origin = None if config_file is None else Path(config_file).absolute()
    run_dir = RunDir(path, config, data, origin)
    refuse_url(path)
    if (path / CONFIG_FILE).exists():
        if not resume:
            raise UserError(
                f"{path} has a run already: leave --resume at auto to continue it, or give another "
                "--run_dir=..."
            )
        run_dir.refuse_other_run()
    elif path.exists() and not _is_empty(path):
        raise UserError(f"{path} exists and is no run directory: give another --run_dir=...")
    return run_dir


def _begun_with(run_dir: Path, config: Config) -> Config:
    """The settings that a run began with.

    Until it has saved anything, its micro-batch size is the config's: the first step of many a run
    ends for want of memory.
    """
    begun = load_config(run_dir / CONFIG_FILE)
    if CheckpointStore(run_dir).steps():
        return begun
    rows = {"micro_batch_size": config.batch.micro_batch_size}
    return begun.model_copy(update={"batch": begun.batch.model_copy(update=rows)})


def open_saved_run(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    step: int | None = None,
    *,
    best: bool = False,
) -> tuple[RunDir, int]:
    """An existing run with its data, and the step of the checkpoint that is chosen.

    Args:
        overrides: say where shards and tokenizer are now, for example.

    Raises:
        UserError: no run there, its data is gone, or the checkpoint is; see
            :meth:`RunDir.choose`.
    """
    config = saved_config(run_dir, overrides)
    for key in ("shards", "tokenizer"):
        place = getattr(config.data, key)
        if "://" not in place and not Path(place).exists():
            raise UserError(
                f"data.{key} is not at {place} any more: say where it is now, with --data.{key}=..."
            )
    opened = RunDir(Path(config.run_dir), config, open_data(config))
    return opened, opened.choose(step, best=best)


def saved_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of an existing run directory, with overrides that do not change its result.

    Raises:
        UserError: there is none, or it is of another release, or of another run with the overrides.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{run_dir} is no run directory: it has no {CONFIG_FILE}; pretrain.py makes one"
        )
    check_version(path.parent)
    # The directory may have been moved since.
    moved = {"run_dir": str(Path(run_dir).absolute())}
    config = load_config(path, overrides).model_copy(update=moved)
    refuse_other_run(config, load_config(path))
    return config


def save_version(
    run_dir: Path, store: CheckpointStore, begun_with: dict[str, str] | None = None
) -> None:
    """Say which release a run directory is of, and which data stream its run is shown.

    Args:
        begun_with: digests of shards and tokenizer, and the config file, where they are known.
    """
    stream = stream_version_of(run_dir)
    release = {"kantai": kantai.__version__, "format": FORMAT, "stream": stream}
    version = {**release, **(begun_with or {})}
    with store.replaced(run_dir / VERSION_FILE) as partial:
        partial.write_text(json.dumps(version) + "\n", encoding="utf-8")


def stream_version_of(run_dir: Path) -> int:
    """The version of the data stream that this release shows the run of a directory."""
    masking = read_settings(run_dir / CONFIG_FILE).get("masking")
    unit = masking.get("unit") if isinstance(masking, dict) else None
    return stream_version(unit or "token")


def _read_version(run_dir: Path) -> dict[str, Any]:
    """What :func:`save_version` wrote; nothing where it did not."""
    path = run_dir / VERSION_FILE
    if not path.exists():
        return {}
    try:
        version = json.loads(path.read_text(encoding="utf-8"))
        release = {key: int(version[key]) for key in ("format", "stream")}
        return {**version, **release, "kantai": str(version["kantai"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: bring it back from a copy") from None


def check_version(run_dir: Path) -> None:
    """Refuse a run directory that this release would misread, or continue with other data."""
    version = _read_version(run_dir)
    if not version:
        if any((run_dir / "checkpoints").glob("update-*")) or _has_old_settings(run_dir):
            raise UserError(
                f"{run_dir} is a run of kantai 0.1: convert it, once, with "
                f"python scripts/convert.py {run_dir}"
            )
        return
    release = version["kantai"]
    is_named_otherwise = version["format"] != FORMAT
    if is_named_otherwise or version["stream"] != stream_version_of(run_dir):
        fault = "names its files otherwise" if is_named_otherwise else "would show it other data"
        raise UserError(
            f"{run_dir} is a run of kantai {release}, and this release ({kantai.__version__}) "
            f"{fault}: continue it with kantai {release}"
        )


def _has_old_settings(run_dir: Path) -> bool:
    text = (run_dir / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    return "_updates:" in text or "until_update:" in text


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing that a user put there, but for a place for checkpoints.

    A start that was killed at once, an editor, a file server and a new disk leave hidden files or
    ``lost+found``; the start, also ``checkpoints`` with such files.
    """
    if not path.is_dir():
        return False
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return all(
        entry.name == "lost+found" or (entry.name == "checkpoints" and _is_empty(entry))
        for entry in entries
    )
