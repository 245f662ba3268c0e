"""Conversion of a run directory of kantai 0.1 to this release, in place.

Each step leaves a directory that this module can go on with, so a conversion that was killed is
done by starting it again. ``version.json`` is written last.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from kantai.checkpoint.store import CheckpointStore
from kantai.config.conversion import RENAMED, convert_text
from kantai.config.loading import fixed_settings, load_config
from kantai.config.schema import Config
from kantai.data.dataset import STREAM_VERSION
from kantai.errors import UserError
from kantai.storage.atomic import Damaged, digest, manifest_entry, replaced, verify
from kantai.storage.json_lines import read_json_lines
from kantai.training.run_dir import CONFIG_FILE, VERSION_FILE, save_version, stream_version_of
from kantai.training.skipped_data import SKIPPED_DATA_FILE

_SKIPPED_DATA_BEFORE = "passed_over.jsonl"
_KEYS = {
    "update": "step",
    "speed/update_seconds": "speed/step_seconds",
    "from_update": "from_step",
    "passed_over": "skipped_data",
    "good_updates": "good_steps",
}


def convert_config_file(path: Path) -> bool:
    """Rename the settings of a YAML file. Returns whether there was anything to do.

    Raises:
        UserError: it cannot be read.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    after = convert_text(before)
    if after == before:
        return False
    with replaced(path) as partial:
        partial.write_text(after, encoding="utf-8")
    return True


def convert_run(run_dir: Path) -> Iterator[str]:
    """Convert a run directory, and yield a line for everything that was done.

    No start of the run may be at work; one that is ends, as it is superseded.

    Raises:
        UserError: it is no run directory of kantai 0.1, or its checkpoints are of another config.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir} is no run directory: it has no {CONFIG_FILE}")
    if (run_dir / VERSION_FILE).exists():
        raise UserError(f"{run_dir} is a run of this release already")
    if stream_version_of(run_dir) != STREAM_VERSION:
        raise UserError(
            f"{run_dir} masks words or spans, and this release finds other words in a text: "
            "finish the run with kantai 0.1"
        )
    store = CheckpointStore(run_dir)
    store.supersede()
    if convert_config_file(run_dir / CONFIG_FILE):
        yield f"{CONFIG_FILE}: settings renamed"
    config = load_config(run_dir / CONFIG_FILE)
    for before in sorted(store.folder.glob("update-*")):
        yield _convert_checkpoint(store, before, config)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        _convert_lines(store, metrics, metrics)
        yield "metrics.jsonl: keys renamed"
    skipped = run_dir / _SKIPPED_DATA_BEFORE
    if skipped.exists():
        _convert_lines(store, skipped, run_dir / SKIPPED_DATA_FILE)
        skipped.unlink()
        yield f"{_SKIPPED_DATA_BEFORE}: now {SKIPPED_DATA_FILE}"
    save_version(run_dir, store)
    yield f"{run_dir}: pretrain.py goes on with it"


def _convert_checkpoint(store: CheckpointStore, before: Path, config: Config) -> str:
    """Write a checkpoint anew under its new name, and remove the old one."""
    try:
        manifest = verify(before)
    except Damaged as damage:
        return f"{before.name}: left alone, as it is damaged ({damage})"
    step = int(manifest["update"])
    lineage = _renamed(manifest["lineage"])
    settings = fixed_settings(config)
    if lineage["config"] != digest(_settings_before(config)):
        raise UserError(
            f"{before} was made with other settings than {CONFIG_FILE} says: bring that back to "
            "what it was"
        )
    lineage |= {"settings": settings, "config": digest(settings)}
    if not store.path(step).exists():
        folder = store.begin(step)
        files = {}
        for name in manifest["files"]:
            _convert_tensors(before / name, folder / name)
            files[name] = manifest_entry(folder / name)
        store.publish(step, files, lineage=lineage)
    verify(store.path(step))
    shutil.rmtree(before)
    return f"{before.name}: now {store.path(step).name}"


def _convert_tensors(before: Path, after: Path) -> None:
    with safe_open(before, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        numbers = json.loads(file.metadata()["numbers"])
    save_file(tensors, after, metadata={"numbers": json.dumps(_renamed(numbers))})


def _convert_lines(store: CheckpointStore, before: Path, after: Path) -> None:
    with store.replaced(after) as partial, partial.open("w", encoding="utf-8") as file:
        for record in read_json_lines(before):
            file.write(json.dumps(_renamed(record)) + "\n")


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    return {_KEYS.get(key, key): value for key, value in record.items()}


def _settings_before(config: Config) -> dict[str, Any]:
    """The fixed settings of kantai 0.1 under their names there, as its checkpoints know them."""
    settings = fixed_settings(config)
    settings.pop("batch.micro_batch_size", None)  # which might change then
    settings["failures.spike_factor"] = config.failures.spike_factor  # which might not
    before = {new: old for old, new in RENAMED.items()}
    stages = [
        {
            before.get(f"stages.{key}", f"stages.{key}").split(".")[1]: value
            for key, value in s.items()
        }
        for s in settings["stages"]
    ]
    return {before.get(key, key): value for key, value in settings.items()} | {"stages": stages}
