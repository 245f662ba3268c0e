"""A run continues with its recorded settings, its data stream and its own checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kantai
from kantai.config.loading import fixed_settings, load_config
from kantai.config.schema import Config
from kantai.data.dataset import STREAM_VERSION, open_data
from kantai.errors import UserError
from kantai.storage.atomic import manifest_entry
from kantai.training.run_dir import (
    FORMAT,
    VERSION_FILE,
    RunDir,
    load_run_config,
    open_run_dir,
    saved_config,
)
from tests.helpers.commands import CONFIG, TINY


@pytest.fixture
def started_run(tmp_path: Path, shards_dir: Path, tokenizer_dir: Path) -> tuple[Path, list[str]]:
    """The run directory of a started run, and the arguments for the directory and the data."""
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    arguments = [*where, f"--run_dir={tmp_path / 'run'}"]
    config = load_config(CONFIG, [*TINY, *arguments, "--optimizer.learning_rate=0.003"])
    open_run_dir(config, open_data(config)).create()
    return tmp_path / "run", arguments


def open_run(config: Config) -> RunDir:
    return open_run_dir(config, open_data(config))


def test_omitted_settings_come_from_run(started_run: tuple[Path, list[str]]) -> None:
    """A later release may change a default."""
    path, arguments = started_run
    small = path.parent / "small.yaml"
    small.write_text(f"run_dir: {path}\n")
    config = load_run_config(small)
    assert config == saved_config(path)
    assert config.optimizer.learning_rate == 0.003
    open_run(config)

    config = load_run_config(small, ["--checkpoint.every_steps=7", *arguments])
    assert config.checkpoint.every_steps == 7
    assert config.optimizer.learning_rate == 0.003
    open_run(config)


def test_given_result_setting_must_match_run(started_run: tuple[Path, list[str]]) -> None:
    _, arguments = started_run
    # The file's learning rate differs from the run's.
    config = load_run_config(CONFIG, [*TINY, *arguments])
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0\.003 and is 0\.001"):
        open_run(config)


def test_run_of_max_steps_refuses_epochs(started_run: tuple[Path, list[str]]) -> None:
    path, _ = started_run
    small = path.parent / "small.yaml"
    small.write_text(f"run_dir: {path}\ntraining: {{epochs: 2}}\n")
    with pytest.raises(UserError, match=r"training.max_steps was 2000 and is null"):
        open_run(load_run_config(small))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ({"format": FORMAT, "stream": STREAM_VERSION + 1}, "would show it other data"),
        ({"format": FORMAT + 1, "stream": STREAM_VERSION}, "names its files otherwise"),
    ],
)
def test_refusal_of_run_names_its_release(
    started_run: tuple[Path, list[str]], version: dict[str, int], message: str
) -> None:
    path, arguments = started_run
    (path / VERSION_FILE).write_text(json.dumps({"kantai": "9.9.9", **version}))
    reads: list[Callable[[], Any]] = [
        lambda: load_run_config(CONFIG, arguments),
        lambda: open_run(load_config(CONFIG, [*TINY, *arguments])),
        lambda: saved_config(path),
    ]
    for read in reads:
        with pytest.raises(UserError, match=message) as error:
            read()
        assert str(error.value).endswith("continue it with kantai 9.9.9")
        assert kantai.__version__ in str(error.value)


def test_damaged_version_file_is_named(started_run: tuple[Path, list[str]]) -> None:
    path, _ = started_run
    for text in ("", "[]", '{"kantai": "0.2.0"}'):
        (path / VERSION_FILE).write_text(text)
        with pytest.raises(UserError, match=r"version\.json is damaged"):
            saved_config(path)


def save_checkpoint(run: RunDir, settings: dict[str, Any]) -> None:
    store = run.store
    store.supersede()
    folder = store.begin(2)
    (folder / "state").write_text("state")
    entry = manifest_entry(folder / "state")
    store.publish(2, {"state": entry}, lineage={**run.lineage, "settings": settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"seed": 1}, "was made with seed 1, and .*/config.yaml says 0"),
        # An older release does not know the setting, and trains with its default.
        ({"masking.ratio": None}, None),
        ({"optimizer.learning_rate": None}, "was made with optimizer.learning_rate 0.0005"),
        ({"model.rope": True}, "was made with model.rope, which this release does not know"),
    ],
)
def test_checkpoint_settings_are_compared_by_key(
    started_run: tuple[Path, list[str]], change: dict[str, Any], message: str | None
) -> None:
    path, _ = started_run
    run = open_run(saved_config(path))
    settings = fixed_settings(run.config) | change
    save_checkpoint(run, {key: value for key, value in settings.items() if value is not None})
    if message is None:
        assert run.newest() == 2
        return
    with pytest.raises(UserError, match=message):
        run.newest()


def test_hand_edited_config_is_refused(started_run: tuple[Path, list[str]]) -> None:
    path, _ = started_run
    run = open_run(saved_config(path))
    save_checkpoint(run, fixed_settings(run.config))
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(UserError, match=r"was made with seed 0, and .* says 5"):
        open_run(saved_config(path)).newest()
