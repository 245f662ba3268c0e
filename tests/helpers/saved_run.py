"""Run directories with checkpoints, made without training."""

from collections.abc import Mapping
from pathlib import Path

import torch

from kantai.checkpoint.state import Snapshot
from kantai.checkpoint.store import HELD_OUT_LOSS
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.model.roberta import MaskedRoberta, build_model
from kantai.training.run_dir import RunDir, open_run_dir
from tests.helpers.commands import CONFIG, TINY


def make_saved_run(
    path: Path, shards: Path, tokenizer: Path, scores: Mapping[int, float | None]
) -> RunDir:
    """Make a run directory with a checkpoint for each step, some of them scored.

    The bias of the model's head is the step.
    """
    where = [f"--data.shards={shards}", f"--data.tokenizer={tokenizer}", f"--run_dir={path}"]
    length = ["--training.max_steps=1000", "--training.epochs=null"]
    config = load_config(CONFIG, [*TINY, *where, *length])
    run_dir = open_run_dir(config, open_data(config))
    run_dir.create()
    run_dir.store.supersede()
    for step, score in scores.items():
        save_step(run_dir, step, score)
    return run_dir


def save_step(run_dir: RunDir, step: int, score: float | None = None) -> None:
    """Publish a checkpoint."""
    parameters = dict(model_at(run_dir, step).named_parameters())
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    snapshot = Snapshot("state-00000-of-00001.safetensors", tensors, {"steps": float(step)})
    files = dict([snapshot.save(run_dir.store.begin(step))])
    meta = {} if score is None else {HELD_OUT_LOSS: score}
    run_dir.store.publish(step, files, lineage=run_dir.lineage, **meta)


def model_at(run_dir: RunDir, step: int) -> MaskedRoberta:
    """Return a model of the run whose head has the bias ``step``."""
    data = run_dir.data
    model = build_model(run_dir.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)
    with torch.no_grad():
        model.lm_head.bias.fill_(float(step))
    return model
