"""What one rank does with an update and a checkpoint; tests/test_backends.py has the ranks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CONFIG, TINY
from safetensors.torch import load_file, save_file

from kantai import UserError
from kantai.cluster import Place
from kantai.config import load_config
from kantai.data import open_data
from kantai.engine import Engine, LossScale, Outcome
from kantai.engine.launch import complete
from kantai.model import MicroBatch, build_model


class Run:
    """An engine and its data, without a loop."""

    def __init__(self, *arguments: str) -> None:
        config = load_config(CONFIG, [*TINY, "--run_dir=unused", *arguments])
        data = open_data(config)
        self.engine = Engine(config, Place(0, 1, 0), build_model(config, data.vocabulary))
        self.batches = data.training_batches(1)

    def update(self, number: int, *limit: float) -> Outcome:
        steps = range(self.batches.stage(number).plan.gradient_accumulation_steps)
        return self.engine.update(number, [MicroBatch(self.batches.micro_batch(number, step, 0)) for step in steps], 1e-3, *limit)

    def weights(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.engine.raw_model.state_dict().items()}


@pytest.fixture
def start(shards_dir: Path, tokenizer_dir: Path) -> Callable[..., Run]:
    return lambda *arguments: Run(f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}", *arguments)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_above_the_limit_is_not_done(optimizer: str, start: Callable[..., Run]) -> None:
    run = start(f"--optimizer.name={optimizer}")
    before, norm = run.weights(), run.update(0, math.inf, 0.0).grad_norm
    assert same(run.weights(), before)
    assert not run.update(0, math.inf, norm * 1.01).skipped
    assert not same(run.weights(), before)
    assert run.update(1, math.inf, norm / 10).skipped
    assert run.update(2, 1.0).skipped  # of a loss


def test_an_overflow_of_fp16_halves_the_scale_and_costs_one_update(start: Callable[..., Run]) -> None:
    run = start("--training.precision=fp16")
    run.engine.loss_scale.value = 2.0**100
    before, outcome = run.weights(), run.update(0)
    assert (outcome.skipped, outcome.loss_scale, run.engine.loss_scale.value) == (False, 2.0**100, 2.0**99)
    assert math.isinf(outcome.grad_norm) or math.isnan(outcome.grad_norm)
    assert same(run.weights(), before)
    run.engine.loss_scale.value = 2.0**10
    assert run.update(1).grad_norm < 10
    assert not same(run.weights(), before)


def test_the_loss_scale_grows_when_all_is_well() -> None:
    scale = LossScale("fp16")
    start = scale.value
    for _ in range(2 * LossScale.PATIENCE):
        scale.after(overflowed=False)
    assert scale.value == 4 * start
    for _ in range(100):
        scale.after(overflowed=True)
    assert scale.value == 1
    assert LossScale("bf16").value == 1


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_the_tensor(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.update(0)
    run.engine.save_state(tmp_path)
    run.engine.load_state(tmp_path)
    (path,) = tmp_path.glob("state-*.safetensors")
    tensors, name = load_file(path), "roberta.embeddings.LayerNorm.bias/exp_avg_sq"
    for change, message in (
        ({}, f"lacks tensor {name}"),
        ({name: tensors[name], "roberta.more": torch.zeros(1)}, "has an unknown tensor roberta.more"),
        ({name: torch.zeros(3)}, rf"{name} has shape \[3\], the model's is \[32\]"),
    ):
        save_file({key: value for key, value in tensors.items() if key != name} | change, path)
        before = run.weights()
        with pytest.raises(UserError, match=message):
            run.engine.load_state(tmp_path)
        assert same(run.weights(), before)


def test_a_deepspeed_file_may_not_decide_the_precision_or_hide_the_state() -> None:
    with pytest.raises(UserError, match="enables bf16: leave that out"):
        complete({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, 1.0)
    with pytest.raises(UserError, match="has offload_optimizer on nvme"):
        complete({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 1.0)
    config: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "bf16": {"enabled": "auto"}}
    complete(config, 0.5)
    assert (config["gradient_clipping"], config["zero_optimization"]["overlap_comm"]) == (0.5, False)
