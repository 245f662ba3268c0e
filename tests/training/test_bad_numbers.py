"""A run goes back before bad numbers, wherever its checkpoints are, and saves none of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.environment import RankInfo
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.diagnostics.faults import nan_loss_on_data
from kantai.distributed.engine import Engine, StepResult
from kantai.errors import UserError
from kantai.storage.atomic import manifest_entry, publish, read_manifest
from kantai.training.run_dir import RunDir, open_run_dir, open_saved_run
from kantai.training.trainer import Trainer, train
from tests.helpers.commands import CONFIG, TINY
from tests.helpers.files import file_contents
from tests.helpers.runs import checkpoint_tensors, metrics

STEPS = 16
MakeRun = Callable[..., RunDir]


@pytest.fixture
def make_run(shards_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> MakeRun:
    def make(name: str, *arguments: str) -> RunDir:
        settings = [
            *TINY,
            f"--data.shards={shards_dir}",
            f"--data.tokenizer={tokenizer_dir}",
            f"--run_dir={tmp_path / name}",
            f"--training.max_steps={STEPS}",
            "--training.epochs=null",
            "--checkpoint.keep=9",
            *arguments,
        ]
        config = load_config(CONFIG, settings)
        return open_run_dir(config, open_data(config))

    return make


def do(run: RunDir) -> bool:
    return train(run, RankInfo(0, 1, 0))


def windows(run: RunDir) -> list[list[int]]:
    text = (run.path / "skipped_data.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [[record[key] for key in ("from_step", "first", "stop")] for record in records]


def assert_same_end(run: RunDir, reference: RunDir) -> None:
    tensors = checkpoint_tensors(run.path, STEPS)
    expected = checkpoint_tensors(reference.path, STEPS)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor == expected[name]).all(), name
    assert metrics(run.path, "train/loss") == metrics(reference.path, "train/loss")


@contextmanager
def weight_after_step(number: int, value: float, times: int = 1) -> Iterator[list[int]]:
    """Set a weight after a step, as a faulty device may, for the first ``times`` times."""
    real = Engine.train_step
    struck: list[int] = []

    def train_step(self: Engine, step: int, *rest: Any) -> StepResult:
        result = real(self, step, *rest)
        if step == number and len(struck) < times:
            struck.append(step)
            with torch.no_grad():
                self.optimizer.layout.tensors[-1].tensor.view(-1)[0] = value
        return result

    with patch.object(Engine, "train_step", train_step):
        yield struck


def poison(store: CheckpointStore, step: int, value: float = float("inf")) -> None:
    """Publish a checkpoint again with a bad number in it, as an earlier release may have."""
    folder = store.path(step)
    manifest = read_manifest(folder)
    (path,) = folder.glob("state-*")
    tensors = load_file(path)
    name = min(name for name in tensors if "/" not in name)
    tensors[name].view(-1)[0] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    aside = folder.rename(folder.with_name("poisoned"))
    del manifest["files"]
    publish(aside, folder, {path.name: manifest_entry(aside / path.name)}, **manifest)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("step", [6, STEPS - 1])
def test_poisoned_weight_is_never_saved(value: float, step: int, make_run: MakeRun) -> None:
    """At step 6 a checkpoint is due; at the last one the run would be finished with it."""
    run = make_run("run", "--checkpoint.every_steps=7")
    with weight_after_step(step, value):
        assert do(run)
    for saved in run.store.steps():
        for name, tensor in checkpoint_tensors(run.path, saved).items():
            assert torch.from_numpy(tensor).isfinite().all(), (saved, name)
    assert windows(run) == [[step - 1, step - 1, step + 1]]
    assert open_saved_run(run.path)[1] == STEPS


def test_weight_that_no_loss_shows_is_noticed(make_run: MakeRun) -> None:
    """A second moment that overflows stops its weight for good, and no loss tells."""
    run = make_run("run", "--checkpoint.every_steps=4")
    real = Engine.train_step
    struck: list[int] = []

    def train_step(self: Engine, step: int, *rest: Any) -> StepResult:
        result = real(self, step, *rest)
        if step == 9 and not struck:
            struck.append(step)
            sharded = self.optimizer.layout.tensors[0]
            self.optimizer.moments(sharded)["exp_avg_sq"].view(-1)[0] = float("inf")
        return result

    with patch.object(Engine, "train_step", train_step):
        assert do(run)
    assert windows(run) == [[8, 8, 10]]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_poisoned_checkpoint_is_passed_over(
    value: float, make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    """An earlier release may have saved it, also as that of the last step."""
    whole = make_run("whole", "--checkpoint.every_steps=4")
    assert do(whole)
    run = make_run("run", "--checkpoint.every_steps=4")
    assert do(run)
    for step in (12, STEPS):
        poison(run.store, step, value)
    assert not run.is_finished()
    assert open_saved_run(run.path)[1] == 8
    assert "a number that is not finite" in capfd.readouterr().out
    assert do(run)
    assert_same_end(run, whole)
    aside = {path.name for path in run.store.folder.glob("damaged-*")}
    assert aside == {"damaged-step-00000012", f"damaged-step-{STEPS:08d}"}


def test_run_with_only_poisoned_checkpoints_is_refused(make_run: MakeRun) -> None:
    run = make_run("run", "--checkpoint.every_steps=8")
    assert do(run)
    for step in run.store.steps():
        poison(run.store, step)
    before = file_contents(run.path)
    with pytest.raises(UserError, match=r"all of the 2 checkpoints in .* are damaged"):
        open_saved_run(run.path)
    assert file_contents(run.path) == before


def test_bad_steps_before_first_checkpoint_are_skipped(make_run: MakeRun) -> None:
    """A start that knows the record does what the run did after it went back to step 0."""
    run = make_run("run", "--checkpoint.every_steps=8")
    with nan_loss_on_data([2, 3, 4], 0):
        assert do(run)
    assert windows(run) == [[1, 1, 5]]

    replayed = make_run("replayed", "--checkpoint.every_steps=8")
    replayed.path.mkdir()
    replayed.create()
    (replayed.path / "skipped_data.jsonl").write_bytes(
        (run.path / "skipped_data.jsonl").read_bytes()
    )
    assert do(replayed)
    assert_same_end(run, replayed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_first_steps_are_skipped(optimizer: str, make_run: MakeRun) -> None:
    chosen = f"--optimizer.name={optimizer}"
    run = make_run("run", "--checkpoint.every_steps=8", chosen)
    with nan_loss_on_data([0, 1, 2], 0):
        assert do(run)
    assert windows(run) == [[0, 0, 3]]


def test_endless_bad_steps_end_the_run(make_run: MakeRun) -> None:
    run = make_run("run", "--checkpoint.every_steps=4")
    trainer = Trainer(run, RankInfo(0, 1, 0))
    with (
        nan_loss_on_data(range(6, 10_000), 0),
        pytest.raises(UserError, match="so the data is not the cause: lower optimizer"),
    ):
        trainer.train()
    trainer.logger.finish()
    trainer.watchdog.stop()
    assert run.store.steps() == [4]


@contextmanager
def stop_after_step(run: RunDir, number: int) -> Iterator[None]:
    """Ask a run to stop after a step, counted from 1."""
    real = Engine.train_step

    def train_step(self: Engine, step: int, *rest: Any) -> StepResult:
        result = real(self, step, *rest)
        if step == number - 1:
            (run.path / "STOP").touch()
        return result

    with patch.object(Engine, "train_step", train_step):
        yield


@pytest.mark.parametrize(("every", "stop_at"), [(2, 11), (5, 9), (5, 10), (7, 12), (8, 10)])
def test_skipped_data_follows_from_bad_steps_alone(
    every: int, stop_at: int, make_run: MakeRun
) -> None:
    """Checkpoints of other steps, and a stop before or within the bad steps, change nothing."""
    reference = make_run("reference", "--checkpoint.every_steps=4")
    run = make_run("run", f"--checkpoint.every_steps={every}")
    with nan_loss_on_data([10, 11, 12], 0):
        assert do(reference)
        with stop_after_step(run, stop_at):
            assert not do(run)
        assert do(run)
    assert windows(run) == windows(reference) == [[9, 9, 13]]
    assert_same_end(run, reference)


def test_only_checkpoint_is_not_thrown_away(make_run: MakeRun) -> None:
    """The bad steps follow the only checkpoint: the run goes on from it, and skips them alone."""
    run = make_run("run", "--checkpoint.every_steps=8")
    with nan_loss_on_data([8, 9, 10], 0):
        assert do(run)
    assert windows(run) == [[8, 8, 11]]
    assert metrics(run.path, "train/skipped") == [0.0] * STEPS


def test_checkpoint_of_stop_is_scored_by_next_start(make_run: MakeRun) -> None:
    """A start that was asked to stop has no time to evaluate."""
    arguments = ("--checkpoint.every_steps=5", "--evaluation.every_steps=5")
    whole = make_run("whole", *arguments)
    assert do(whole)
    run = make_run("run", *arguments)
    with stop_after_step(run, 10):
        assert not do(run)
    assert run.store.steps() == [5, 10] and list(run.store.scores()) == [5]
    assert do(make_run("run", *arguments))
    assert run.store.scores() == whole.store.scores()
    assert list(run.store.scores()) == [5, 10, 15, STEPS]
    assert run.choose(best=True) == whole.choose(best=True)
    assert_same_end(run, whole)
