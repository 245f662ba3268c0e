"""An engine of one rank trains, saves and loads. tests/integration/test_backends.py has several."""

import dataclasses
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kantai.checkpoint.state import SavedState
from kantai.cluster.environment import RankInfo
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.loader import MicroBatch
from kantai.distributed.engine import Engine, StepResult
from kantai.errors import UserError
from kantai.model.roberta import build_model
from kantai.optim.sharding import Layout
from tests.helpers.commands import CONFIG, TINY


class Run:
    """An engine and its data, without a training loop."""

    def __init__(self, *arguments: str) -> None:
        config = load_config(CONFIG, [*TINY, "--run_dir=unused", *arguments])
        data = open_data(config)
        self.engine = Engine(
            RankInfo(0, 1, 0),
            build_model(
                config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
            ),
            config.optimizer,
            config.training,
            seed=config.seed,
        )
        self.batches = data.training_batches(1)

    def train_step(self, number: int, *limit: float) -> StepResult:
        micro_steps = range(self.batches.stage_at(number).plan.gradient_accumulation_steps)
        return self.engine.train_step(
            number,
            [
                MicroBatch(self.batches.micro_batch(number, micro_step, 0))
                for micro_step in micro_steps
            ],
            1e-3,
            *limit,
        )

    def weights(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.engine.raw_model.state_dict().items()}


@pytest.fixture
def make_run(shards_dir: Path, tokenizer_dir: Path) -> Callable[..., Run]:
    return lambda *arguments: Run(
        f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}", *arguments
    )


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_above_limit_is_skipped(optimizer: str, make_run: Callable[..., Run]) -> None:
    run = make_run(f"--optimizer.name={optimizer}")
    before = run.weights()
    norm = run.train_step(0, math.inf, 0.0).grad_norm
    assert equal(run.weights(), before)
    assert not run.train_step(0, math.inf, norm * 1.01).skipped
    assert not equal(run.weights(), before)
    assert run.train_step(1, math.inf, norm / 10).skipped
    assert run.train_step(2, 1.0).skipped  # limit of the loss


def test_fp16_overflow_halves_scale_and_loses_one_step(make_run: Callable[..., Run]) -> None:
    run = make_run("--training.precision=fp16")
    run.engine.loss_scale.value = 2.0**100
    before = run.weights()
    result = run.train_step(0)
    assert (result.skipped, result.loss_scale, run.engine.loss_scale.value) == (
        False,
        2.0**100,
        2.0**99,
    )
    assert math.isinf(result.grad_norm) or math.isnan(result.grad_norm)
    assert equal(run.weights(), before)

    run.engine.loss_scale.value = 2.0**10
    assert run.train_step(1).grad_norm < 10
    assert not equal(run.weights(), before)


def test_checkpoint_of_other_model_names_tensor(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    run.train_step(0)
    run.engine.save_state(tmp_path)
    run.engine.load_state(tmp_path)
    (path,) = tmp_path.glob("state-*.safetensors")
    tensors = load_file(path)
    name = "roberta.embeddings.LayerNorm.bias/exp_avg_sq"
    for change, message in (
        ({}, f"lacks tensor {name}"),
        (
            {name: tensors[name], "roberta.more": torch.zeros(1)},
            "has an unknown tensor roberta.more",
        ),
        ({name: torch.zeros(3)}, rf"{name} has shape \[3\], the model's is \[32\]"),
    ):
        save_file({key: value for key, value in tensors.items() if key != name} | change, path)
        before = run.weights()
        with pytest.raises(UserError, match=message):
            run.engine.load_state(tmp_path)
        assert equal(run.weights(), before)


def test_every_micro_step_sends_heartbeat(make_run: Callable[..., Run]) -> None:
    run = make_run("--batch.micro_batch_size=2")
    heartbeats: list[int] = []
    run.engine.heartbeat = lambda: heartbeats.append(0)
    run.train_step(0)
    assert len(heartbeats) == 5


def test_moments_of_other_ranks_are_not_read(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    read: list[str] = []
    run.engine.save_state(tmp_path)
    first, *others = run.engine.optimizer.layout.tensors
    (part,) = first.slices
    empty = dataclasses.replace(first, slices=[dataclasses.replace(part, numel=0)])
    run.engine.optimizer.set_layout(Layout([empty, *others]))
    real = SavedState.__getitem__
    monkeypatch.setattr(
        SavedState, "__getitem__", lambda self, name: read.append(name) or real(self, name)
    )
    run.engine.load_state(tmp_path)
    assert part.name in read  # every rank reads the whole weight
    assert [name for name in read if name.startswith(f"{part.name}/")] == []
    assert f"{others[0].slices[0].name}/exp_avg" in read


@pytest.mark.parametrize(
    ("copies", "found"),
    [
        ([1, 2, 1], "rank 1 (NODE) has other weights than the rest: a device may be faulty"),
        (
            [1, 2],
            "rank 0 (NODE), rank 1 (NODE) differ in their weights, and none has most ranks on its "
            "side",
        ),
        (
            [1, 1, 2, 2],
            "rank 0 (NODE), rank 1 (NODE), rank 2 (NODE), rank 3 (NODE) differ in their weights",
        ),
    ],
)
def test_rank_with_different_weights_is_named(
    copies: list[int], found: str, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_run().engine
    engine.compare_replicas()
    monkeypatch.setattr(engine, "from_all", lambda own: [(own[0], [copy]) for copy in copies])
    with pytest.raises(UserError) as error:
        engine.compare_replicas()
    assert str(error.value).startswith(found.replace("NODE", platform.node()))
