"""A run continues with its recorded settings, its data stream and its own checkpoints."""

import json
import shutil
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
    open_saved_run,
    saved_config,
)
from kantai.training.saved_model import load_saved_model
from tests.helpers.commands import CONFIG, TINY
from tests.helpers.saved_run import make_saved_run, save_step


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
    with pytest.raises(UserError, match=r"training.max_steps was 2000 and is None"):
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


@pytest.fixture
def scored_run(tmp_path: Path, shards_dir: Path, tokenizer_dir: Path) -> RunDir:
    """Return a run with three checkpoints, of which the second is the best."""
    scores = {10: None, 20: 3.0, 30: 3.5}
    return make_saved_run(tmp_path / "run", shards_dir, tokenizer_dir, scores)


def test_checkpoint_is_chosen_by_step_or_score(scored_run: RunDir) -> None:
    assert open_saved_run(scored_run.path)[1] == 30
    assert open_saved_run(scored_run.path, step=10)[1] == 10
    assert open_saved_run(scored_run.path, best=True)[1] == 20
    with pytest.raises(UserError, match=r"has no checkpoint of step 25; it has 10, 20, 30"):
        scored_run.choose(25)
    (state,) = scored_run.store.path(20).glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    for choose in (lambda: scored_run.choose(20), lambda: scored_run.choose(best=True)):
        with pytest.raises(UserError, match=r"checkpoint 20 is damaged: .* bytes, not "):
            choose()


def test_run_without_scores_has_no_best_checkpoint(scored_run: RunDir) -> None:
    for step in (20, 30):
        shutil.rmtree(scored_run.store.path(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* was scored: .* choose with --step"):
        scored_run.choose(best=True)


def test_saved_run_is_told_where_its_data_is_now(
    scored_run: RunDir, tokenizer_dir: Path, shards_dir: Path, tmp_path: Path
) -> None:
    config = scored_run.path / "config.yaml"
    for key, old in (("shards", shards_dir), ("tokenizer", tokenizer_dir)):
        config.write_text(config.read_text().replace(str(old), str(tmp_path / f"gone-{key}")))
    moved = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    with pytest.raises(
        UserError, match=r"data\.shards is not at .*/gone-shards any more: .*--data"
    ):
        open_saved_run(scored_run.path)
    with pytest.raises(UserError, match=r"data\.tokenizer is not at .*/gone-tokenizer any more"):
        open_saved_run(scored_run.path, moved[:1])
    assert open_saved_run(scored_run.path, moved)[1] == 30
    with pytest.raises(UserError, match="seed was 0 and is 4"):
        open_saved_run(scored_run.path, [*moved, "--seed=4"])


def test_saved_model_outlives_pruning_while_it_is_read(scored_run: RunDir) -> None:
    store = scored_run.store
    opened, step = open_saved_run(scored_run.path)
    save_step(scored_run, 40)
    save_step(scored_run, 50)
    store.prune(2)
    assert store.steps() == [20, 40, 50]
    with pytest.raises(UserError, match="has no checkpoint of step 30; it has 20, 40, 50"):
        load_saved_model(opened, step, lambda: opened.choose(30))
    model, step = load_saved_model(opened, step, opened.choose)
    assert step == 50 and model.lm_head.bias[0] == 50
    model, step = load_saved_model(opened, 10, lambda: opened.choose(best=True))
    assert step == 20 and model.lm_head.bias[0] == 20


def test_conflict_copy_in_checkpoint_is_not_loaded(scored_run: RunDir) -> None:
    """Sync tools keep another version of a file beside it, under a name that sorts after it."""
    folder = scored_run.store.path(30)
    (state,) = scored_run.store.path(10).glob("*.safetensors")
    for name in (
        "state-00000-of-00001 (conflicted copy).safetensors",
        "state-00000-of-00001.sync-conflict-20261125.safetensors",
        "state-00001-of-00002.safetensors",
    ):
        shutil.copyfile(state, folder / name)
    model, _ = load_saved_model(scored_run, 30, scored_run.choose)
    assert model.lm_head.bias[0] == 30
