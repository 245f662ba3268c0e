"""A run continues with its recorded settings, its data stream and its own checkpoints."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import kantai
from kantai.cluster.environment import RankInfo
from kantai.config.loading import fixed_settings, load_config
from kantai.config.schema import Config
from kantai.data.dataset import STREAM_VERSION, open_data
from kantai.errors import UserError
from kantai.storage import atomic
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
from kantai.training.trainer import Trainer
from tests.helpers.commands import CONFIG, ROOT, TINY
from tests.helpers.files import file_contents
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


@pytest.mark.parametrize("fits", [True, False])
def test_checkpoint_of_kantai_0_1_fits_its_tokenizer(
    started_run: tuple[Path, list[str]], fits: bool
) -> None:
    path, _ = started_run
    run = open_run(saved_config(path))
    before = run.data.vocabulary.old_fingerprint
    run.lineage["tokenizer"] = before if fits else before[::-1]
    save_checkpoint(run, fixed_settings(run.config))
    again = open_run(saved_config(path))
    if fits:
        assert again.newest() == 2
        return
    with pytest.raises(UserError, match="was trained on other tokenizer"):
        again.newest()


@pytest.mark.parametrize(("unit", "goes_on"), [("token", True), ("word", False), ("span", False)])
def test_run_of_words_before_marks_belonged_to_them_is_refused(
    tmp_path: Path, shards_dir: Path, tokenizer_dir: Path, unit: str, goes_on: bool
) -> None:
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    arguments = [*TINY, *where, f"--run_dir={tmp_path / 'run'}", f"--masking.unit={unit}"]
    config = load_config(CONFIG, arguments)
    open_run(config).create()
    assert open_run(load_run_config(CONFIG, arguments)).newest() == 0

    version = {"kantai": "0.1.5", "format": FORMAT, "stream": STREAM_VERSION}
    (tmp_path / "run" / VERSION_FILE).write_text(json.dumps(version))
    if goes_on:
        assert open_run(load_run_config(CONFIG, arguments)).newest() == 0
        return
    with pytest.raises(
        UserError, match=r"would show it other data: continue it with kantai 0\.1\.5"
    ):
        load_run_config(CONFIG, arguments)


def edited_run(tmp_path: Path, where: list[str]) -> tuple[Path, list[str]]:
    """Start a run of a config file, and return the file and the arguments."""
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.read_text())
    arguments = [*TINY, *where]
    config = load_run_config(path, arguments)
    open_run_dir(config, open_data(config), config_file=path).create()
    return path, arguments


@pytest.fixture
def where(tmp_path: Path, shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    return [*data, f"--run_dir={tmp_path / 'run'}"]


def test_edited_config_file_does_not_change_begun_run(tmp_path: Path, where: list[str]) -> None:
    path, arguments = edited_run(tmp_path, where)
    begun = saved_config(tmp_path / "run")
    text = path.read_text()
    for old, new in (
        ("learning_rate: 0.001", "learning_rate: 0.002"),
        ("max_steps: 2000", "epochs: 3"),
        ("dropout_prob: 0.0", "dropout_prob: 0.5"),
    ):
        text = text.replace(old, new)
    text += "\nseed: 5\nfailures: {hang_seconds: 77}\n"
    path.write_text(text)
    said: list[str] = []
    config = load_run_config(path, arguments, said.append)
    open_run(config)
    assert fixed_settings(config) == fixed_settings(begun)
    assert config.failures.hang_seconds == 77  # which may change
    shown = "\n".join(said)
    assert "mine.yaml says seed 5 now. This run goes on with 0, as it began" in shown
    assert "training.epochs 3.0 now. This run goes on with null" in shown


def test_override_that_changes_result_is_refused_though_file_is_the_run_s(
    tmp_path: Path, where: list[str]
) -> None:
    path, arguments = edited_run(tmp_path, where)
    for override, message in (
        ("--seed=3", "seed was 0 and is 3"),
        ("--optimizer={learning_rate: 0.5}", "optimizer.learning_rate was 0.001 and is 0.5"),
        ("--training.precision=bf16", "training.precision was 'fp32' and is 'bf16'"),
        ("--training.max_steps=7", "training.max_steps was 2000 and is 7"),
    ):
        with pytest.raises(UserError, match=message):
            open_run(load_run_config(path, [*arguments, override]))


def test_other_config_file_of_run_dir_is_refused(tmp_path: Path, where: list[str]) -> None:
    path, arguments = edited_run(tmp_path, where)
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text() + "\nseed: 5\n")
    with pytest.raises(UserError, match="seed was 0 and is 5"):
        open_run(load_run_config(other, arguments))


def test_refused_start_leaves_run_as_it_is(
    tmp_path: Path, where: list[str], many_shards_dir: Path
) -> None:
    """The run at work has saved no step yet, or has: other shards are refused before either."""
    path, arguments = edited_run(tmp_path, where)
    config = load_run_config(path, arguments)
    at_work = open_run_dir(config, open_data(config), config_file=path)
    at_work.take_over()
    before = file_contents(tmp_path / "run")
    for checkpoint in (False, True):
        if checkpoint:
            save_checkpoint(at_work, fixed_settings(config))
            before = file_contents(tmp_path / "run")
        other = load_run_config(path, [*arguments, f"--data.shards={many_shards_dir}"])
        with pytest.raises(UserError, match="was trained on other shards than"):
            open_run(other).take_over()
        assert file_contents(tmp_path / "run") == before
        assert not at_work.store.is_superseded()


def test_all_that_ranks_need_alike_is_compared(tmp_path: Path, where: list[str]) -> None:
    config = load_config(CONFIG, [*TINY, *where])
    reference = open_run(config).in_common
    for override, is_alike in (
        ("--seed=1", False),
        ("--training.max_steps=5", False),
        ("--training.precision=bf16", False),
        ("--batch.micro_batch_size=3", False),
        ("--evaluation.every_steps=3", False),
        ("--failures.compare_replicas_every=3", False),
        ("--data.workers=2", True),
        (f"--data.cache_dir={tmp_path}", True),
        ("--data.verify_hashes=true", True),
    ):
        other = open_run(load_config(CONFIG, [*TINY, *where, override])).in_common
        assert (other == reference) is is_alike, override


def test_settings_that_earlier_release_fixed_otherwise_pass(
    started_run: tuple[Path, list[str]],
) -> None:
    """Release 0.1 fixed spike_factor, and micro_batch_size might change with dropout."""
    path, _ = started_run
    run = open_run(saved_config(path))
    settings = fixed_settings(run.config) | {"failures.spike_factor": 99.0}
    settings.pop("batch.micro_batch_size", None)
    save_checkpoint(run, settings)
    assert run.newest() == 2


def test_micro_batch_size_may_change_before_first_checkpoint(
    tmp_path: Path, where: list[str]
) -> None:
    """A first step that runs out of memory leaves a run directory, and nothing to go on from."""
    path, arguments = edited_run(tmp_path, [*where, "--model.hidden_dropout_prob=0.1"])
    smaller = [*arguments, "--batch.micro_batch_size=2"]
    run = open_run(load_run_config(path, smaller))
    assert run.config.batch.micro_batch_size == 2
    save_checkpoint(run, fixed_settings(run.config))
    with pytest.raises(UserError, match=r"batch\.micro_batch_size was 4 and is 2"):
        open_run(load_run_config(path, smaller))


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


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text + "\nbatch: {micro_", "is not YAML"),
        (lambda text: text + "\nseed: 5\nseed: 6\n", "seed is given twice"),
        (lambda text: text + "\nsede: 5\n", "unknown key 'sede'"),
        (lambda text: text + "\nseed: five\n", "seed: "),
        (lambda text: text + "\ndata: {}\n", "data is given twice"),
        (lambda text: "", "has no keys"),
        (lambda text: None, "cannot read the config"),
    ],
)
@pytest.mark.parametrize("place", ["override", "file"])
def test_run_goes_on_though_its_config_file_cannot_be_read(
    edit: Callable[[str], str | None], message: str, place: str, tmp_path: Path, where: list[str]
) -> None:
    path, arguments = edited_run(tmp_path, where)
    begun = saved_config(tmp_path / "run")
    text = edit(path.read_text())
    if place == "file":
        if not text:
            return  # nothing says which run it is
        run_dir = arguments.pop()
        assert run_dir.startswith("--run_dir=")
        text = re.sub("^run_dir: .*", f"run_dir: {tmp_path / 'run'}", text, flags=re.MULTILINE)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    said: list[str] = []
    override = "--checkpoint.every_steps=7"
    config = load_run_config(path, [*arguments, override], said.append)
    assert open_run(config).path == tmp_path / "run"
    assert fixed_settings(config) == fixed_settings(begun)
    assert config.checkpoint.every_steps == 7
    (note,) = said
    assert message in note and "mine.yaml" in note and "This run goes on with" in note
    assert "\n" not in note


def test_fault_of_override_is_refused_though_file_is_the_run_s(
    tmp_path: Path, where: list[str]
) -> None:
    path, arguments = edited_run(tmp_path, where)
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'sede'"):
        load_run_config(path, [*arguments, "--sede=5"])
    with pytest.raises(UserError, match="cannot read the argument '--seed'"):
        load_run_config(path, [*arguments, "--seed"])
    path.write_text("seed: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_run_config(path, [*arguments, "--sede=5"])
    with pytest.raises(UserError, match="seed was 0 and is 5"):
        open_run(load_run_config(path, [*arguments, "--seed=5"]))


def test_other_config_file_that_cannot_be_read_is_refused(tmp_path: Path, where: list[str]) -> None:
    _, arguments = edited_run(tmp_path, where)
    other = tmp_path / "other.yaml"
    other.write_text("seed: [")
    for path in (other, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=r"is not YAML|cannot read"):
            load_run_config(path, arguments)


def test_config_file_of_run_is_known_by_any_path(
    tmp_path: Path, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arguments = edited_run(tmp_path, where)
    path.write_text(path.read_text() + "\nseed: 5\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "linked.yaml").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "folder/../mine.yaml", "link/mine.yaml", "linked.yaml"):
        assert load_run_config(name, arguments).seed == 0, name


@contextmanager
def supersede_with(
    run: RunDir, *, before: Callable[[], Any] = int, after: Callable[[], Any] = int
) -> Iterator[None]:
    """Do something immediately before or after a start supersedes the earlier ones."""
    real = run.store.supersede

    def supersede() -> None:
        before()
        real()
        after()

    with patch.object(run.store, "supersede", supersede):
        yield


def test_second_first_start_with_other_settings_is_refused(
    tmp_path: Path, where: list[str]
) -> None:
    """Both look before either has begun."""
    first, second = (
        open_run(load_config(CONFIG, [*TINY, *where, f"--seed={seed}"])) for seed in (1, 2)
    )
    first.take_over()
    before = file_contents(first.path)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        second.take_over()
    assert file_contents(first.path) == before
    assert not first.store.is_superseded()


def test_start_that_finds_other_run_at_last_moment_leaves_its_files(
    tmp_path: Path, where: list[str]
) -> None:
    first, second = (
        open_run(load_config(CONFIG, [*TINY, *where, f"--seed={seed}"])) for seed in (1, 2)
    )
    with (
        supersede_with(second, before=first.take_over),
        pytest.raises(UserError, match="seed was 1 and is 2"),
    ):
        second.take_over()
    assert saved_config(first.path).seed == 1
    assert open_run(first.config).take_over() == 0


def test_superseded_start_does_not_write_its_config(tmp_path: Path, where: list[str]) -> None:
    """The settings that differ may change, and so are refused to neither."""
    names = ("config.yaml", "version.json", "prompts.txt")
    for begun in (False, True):
        first, second = (
            open_run_dir(config, open_data(config), config_file=f"{every}.yaml")
            for every in (3, 4)
            for config in [
                load_config(CONFIG, [*TINY, *where, f"--checkpoint.every_steps={every}"])
            ]
        )
        assert (first.path / "config.yaml").exists() is begun
        with (
            supersede_with(first, after=second.take_over),
            pytest.raises(UserError, match="has been superseded by a later start"),
        ):
            first.take_over()
        assert saved_config(first.path).checkpoint.every_steps == 4
        assert "/4.yaml" in (first.path / "version.json").read_text()
        for name in names:
            assert not list(first.path.glob(f".{name}*"))


def test_start_killed_before_its_config_blocks_no_run_directory(
    tmp_path: Path, where: list[str]
) -> None:
    config = load_config(CONFIG, [*TINY, *where])
    open_run(config).store.supersede()
    run = open_run(config)
    run.take_over()
    assert saved_config(run.path) == config

    (run.path / "config.yaml").unlink()
    save_step(run, 2)
    with pytest.raises(UserError, match="exists and is no run directory"):
        open_run(config)


def files_hashed(action: Callable[[], Any]) -> list[str]:
    """Return the names of the checkpoints' files that an action hashes."""
    names = []

    def sha256(path: Path) -> str:
        names.append(f"{path.parent.name}/{path.name}")
        return real(path)

    real = atomic.sha256
    with patch.object(atomic, "sha256", sha256):
        action()
    return names


def test_start_hashes_checkpoint_once_unless_it_changes(scored_run: RunDir) -> None:
    newest = "step-00000030/state-00000-of-00001.safetensors"
    before = "step-00000020/state-00000-of-00001.safetensors"
    assert files_hashed(scored_run.take_over) == [newest]

    def open_again() -> RunDir:
        return open_run_dir(scored_run.config, scored_run.data)

    second = open_again()
    with supersede_with(second, before=lambda: save_step(scored_run, 40)):
        hashed = files_hashed(second.take_over)
    later = newest.replace("30", "40")
    assert hashed[-1] == later and hashed.count(newest) == 1

    third = open_again()
    with supersede_with(third, before=lambda: shutil.rmtree(third.store.path(40))):
        assert files_hashed(third.take_over) == [later, newest]

    fourth = open_again()
    with supersede_with(fourth, before=lambda: third.store.score(30, 2.5)):
        assert files_hashed(fourth.take_over) == [newest, newest]

    fifth = open_again()
    (state,) = scored_run.store.path(30).glob("*.safetensors")
    with supersede_with(fifth, before=lambda: state.write_bytes(state.read_bytes()[:-1])):
        assert files_hashed(fifth.take_over) == [newest, before]
    assert fifth.store.steps() == [10, 20]


@pytest.mark.parametrize(("rank", "local_rank", "hashes"), [(0, 0, 0), (1, 1, 0), (8, 0, 1)])
def test_checkpoint_that_is_loaded_is_hashed_once_a_node(
    scored_run: RunDir, rank: int, local_rank: int, hashes: int
) -> None:
    """Rank 0 has hashed it as it took the run over. Other ranks need a world, so they are acted."""
    loaded: list[Path] = []
    engine = SimpleNamespace(
        rank_info=RankInfo(rank, 16, local_rank),
        from_all=lambda value: [value],
        load_state=loaded.append,
    )
    trainer: Any = SimpleNamespace(engine=engine, store=scored_run.store)
    assert len(files_hashed(lambda: Trainer._load(trainer, 30))) == hashes
    assert loaded == [scored_run.store.path(30)]


def test_finished_run_is_hashed_once(
    scored_run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_step(scored_run, 1000)
    for options in ([], ["--check"]):
        config = scored_run.path / "config.yaml"
        monkeypatch.setattr(sys, "argv", ["pretrain.py", f"--config={config}", *options])
        script = str(ROOT / "scripts/pretrain.py")
        hashed = files_hashed(lambda: runpy.run_path(script, run_name="__main__"))  # noqa: B023
        assert [name for name in hashed if name.startswith("step-")] == [
            "step-00001000/state-00000-of-00001.safetensors"
        ]
        assert f"{scored_run.path}: 1000 of 1000 steps done" in capsys.readouterr().out
