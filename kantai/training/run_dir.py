"""Which run is this? A run directory, the config and data that it belongs to, and how far it has come. No torch: looking is quick."""

import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kantai
from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import fixed_settings, load_config, refuse_other_run, save_config
from kantai.config.schema import Config
from kantai.data.dataset import Data, open_data
from kantai.errors import UserError
from kantai.storage.atomic import digest, replaced, sha256
from kantai.training.skipped_data import SkippedData

CONFIG_FILE = "config.yaml"
PROMPTS_FILE = "prompts.txt"


@dataclass(frozen=True)
class RunDir:
    """A run directory that fits its config and data."""

    path: Path
    config: Config
    data: Data

    @cached_property
    def store(self) -> CheckpointStore:
        """Its checkpoints."""
        return CheckpointStore(self.path)

    def is_finished(self) -> bool:
        """Whether the last step's checkpoint is there, whole."""
        return self.store.steps()[-1:] == [self.data.max_steps] and self.newest() == self.data.max_steps

    def newest(self, *, set_aside: bool = False) -> int:
        """Step count of the newest valid checkpoint, 0 where there is none.

        Args:
            set_aside: move damaged ones out of the way; for one process alone.

        Raises:
            UserError: it was made from other shards or with another tokenizer; or there are checkpoints, and all of them are damaged.
        """
        found = self.store.newest_valid(set_aside=set_aside)
        if found is None:
            if damaged := self.store.steps():
                raise UserError(
                    f"all of the {len(damaged)} checkpoints in {self.store.folder} are damaged: bring one back from a copy, or remove that "
                    "folder to begin with step 0"
                )
            return 0
        step, manifest = found
        ours, theirs = self.lineage, manifest.get("lineage")
        theirs = theirs if isinstance(theirs, dict) else {}
        for key in ("shards", "tokenizer"):
            if theirs.get(key) != ours[key]:
                raise UserError(
                    f"{self.store.path(step)} was trained on other {key} than {getattr(self.config.data, key)}: name those of its start"
                )
        known, passed = SkippedData.of(self.path), theirs.get("skipped_data", [])
        if not isinstance(passed, list) or not {str(list(window)) for window in known.windows} >= set(map(str, passed)):
            raise UserError(f"{known.path} lacks what checkpoint {step} says of data that was skipped: bring it back from a copy")
        return step

    def create(self) -> None:
        """Make the directory with its config and prompts; for one process alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        with replaced(self.path / CONFIG_FILE) as partial:  # first: it is what makes a folder a run directory
            save_config(self.config, partial)
        prompts = (" ".join(prompt.split()) for prompt in self.data.prompts())
        (self.path / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        (self.path / "stacks").mkdir(exist_ok=True)

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """Fingerprints of everything that decides the result, for checkpoints and the model card."""
        sources = sorted(Path(kantai.__file__).parent.rglob("*.py"))
        return {
            "config": digest(fixed_settings(self.config)),
            "shards": digest(self.data.shards.manifest["files"]),
            "tokenizer": self.data.vocabulary.fingerprint,
            "code": digest([sha256(path) for path in sources]),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy")},
                "kantai": kantai.__version__,
            },
        }


def open_run_dir(config: Config, data: Data, *, resume: bool = True) -> RunDir:
    """Look whether a run may start or go on in its directory; writes nothing.

    Args:
        resume: go on where there is something to go on from.

    Raises:
        UserError: the directory is another run's, or no run's, or there is a run and ``resume`` is not wanted.
    """
    path = Path(config.run_dir)
    if (path / CONFIG_FILE).exists():
        if not resume:
            raise UserError(f"{path} has a run already: leave --resume at auto to continue it, or give another --run_dir=...")
        refuse_other_run(config, load_config(path / CONFIG_FILE))
    elif path.exists() and (not path.is_dir() or any(not entry.name.startswith(f".{CONFIG_FILE}") for entry in path.iterdir())):
        raise UserError(f"{path} exists and is no run directory: give another --run_dir=...")
    return RunDir(path, config, data)


def open_saved_run(run_dir: str | Path) -> tuple[RunDir, int]:
    """An existing run with its data, and the step count of its newest valid checkpoint.

    Raises:
        UserError: no run there, its data is gone, or it has saved nothing yet.
    """
    config = saved_config(run_dir)
    opened = RunDir(Path(config.run_dir), config, open_data(config))
    step = opened.newest()
    if step == 0:
        raise UserError(f"{run_dir} has no valid checkpoint yet: run pretrain.py until it saves one")
    return opened, step


def saved_config(run_dir: str | Path) -> Config:
    """The config of an existing run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no {CONFIG_FILE}; pretrain.py makes one")
    # The directory may have been moved since.
    return load_config(path).model_copy(update={"run_dir": str(Path(run_dir).absolute())})
