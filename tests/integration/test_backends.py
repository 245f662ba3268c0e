"""Tests of the true loss and of a change of cluster on every backend.

Real launchers start real gloo ranks. Each launch does several runs.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import RobertaForMaskedLM

from kantai.checkpoint.state import load_weights
from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.export import export
from kantai.model.roberta import build_model
from kantai.storage.atomic import verify
from kantai.training.run_dir import RunDir
from tests.helpers.commands import ROOT, TINY, job, run_jobs
from tests.helpers.runs import assert_same_run, assert_same_weights, checkpoint_tensors, metrics

pytestmark = pytest.mark.slow

STEPS = 6
BACKENDS = [
    ("cpu", 2),
    ("cpu", 3),
    ("zero0", 2),
    ("small1", 2),
    ("small2", 2),
    ("zero2_offload", 2),
    ("small3", 3),
    ("zero3_offload", 2),
]
# The tests' models have 50,000 parameters. These settings make ZeRO split them into several
# buckets, as it splits models of 100 million. Stage 1 also sets all other DeepSpeed switches.
SMALL_BUCKETS: dict[str, dict[str, Any]] = {
    "small1": {
        "stage": 1,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "allgather_partitions": False,
    },
    "small2": {"stage": 2, "allgather_bucket_size": 3000},
    "small3": {
        "stage": 3,
        "sub_group_size": 20_000,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 3000,
        "stage3_max_live_parameters": 3000,
        "stage3_max_reuse_distance": 3000,
    },
}
OPTIMIZERS = ("adamw", "muon")
DROPOUT = ["--model.hidden_dropout_prob=0.1", "--model.attention_probs_dropout_prob=0.1"]
SHAPES = {
    "padded": ["--data.packing=padded"],  # row and micro-batch lengths differ
    "stages": [  # 2, 1 and 3 micro-steps on two ranks
        "--stages=[{until_step: 2, seq_len: 16, global_batch_size: 20}, "
        "{until_step: 4, global_batch_size: 6}]",
        "--batch.global_batch_size=18",
        "--batch.micro_batch_size=3",
        "--masking.final_ratio=0.3",
    ],
}

# Absolute tolerances of the loss (about 8) and the gradient norm (about 2) against one process in
# fp32. In fp32 only the order of sums differs. fp16 and bf16 round each product to 11 and 8 bits;
# the largest differences seen are 4e-5 and 4e-4 in the loss, 2e-4 and 8e-3 in the norm.
TOLERANCE = {"fp32": (1e-5, 1e-5), "fp16": (2e-4, 2e-3), "bf16": (2e-3, 2e-2)}


@pytest.fixture(scope="module")
def arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    """Return arguments for 10 rows in micro-batches of 4: they give accumulation and empty rows."""
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    exact = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
    length = [f"--training.max_steps={STEPS}", "--checkpoint.every_steps=2", "--checkpoint.keep=9"]
    return ["--config=configs/quickstart.yaml", *TINY, *data, *exact, *length]


@pytest.fixture(scope="module")
def references(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the reference: one process without a launcher takes the whole batch at once."""
    folder = tmp_path_factory.mktemp("references")
    whole = [*arguments, "--batch.micro_batch_size=10"]
    jobs = [
        job(folder / optimizer, *whole, f"--optimizer.name={optimizer}") for optimizer in OPTIMIZERS
    ]
    jobs += [job(folder / name, *whole, *how) for name, how in SHAPES.items()]
    run_jobs(None, 1, folder, [*jobs, job(folder / "poisoned", *whole, nan_calls=[3])])
    return folder


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write launcher configs for ``SMALL_BUCKETS``; return paths relative to configs/accelerate."""
    folder = tmp_path_factory.mktemp("launchers")
    names = {}
    for name, zero in SMALL_BUCKETS.items():
        deepspeed = {
            "deepspeed_config_file": str(folder / f"{name}.json"),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": False,
        }
        launcher = yaml.safe_load((ROOT / "configs/accelerate/zero3.yaml").read_text())
        del launcher["mixed_precision"]  # Accelerate refuses it together with a DeepSpeed file
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({**launcher, "deepspeed_config": deepspeed})
        )
        (folder / f"{name}.json").write_text(
            json.dumps({"zero_optimization": {**zero, "reduce_bucket_size": 3000}})
        )
        names[name] = os.path.relpath(folder / name, ROOT / "configs/accelerate")
    return names


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: f"{backend[0]}-{backend[1]}")
def test_every_backend_matches_one_process(
    backend: tuple[str, int],
    launchers: dict[str, str],
    arguments: list[str],
    references: Path,
    tmp_path: Path,
) -> None:
    """The runs cover every precision, batch shape and optimizer.

    They start from scratch, from another backend's checkpoint, and from the same backend's.
    """
    run = tmp_path
    muon = [*arguments, "--optimizer.name=muon"]
    dropout = [*muon, *DROPOUT, "--training.precision=fp16"]
    precisions = {
        precision: [*arguments, f"--training.precision={precision}"] for precision in TOLERANCE
    }
    jobs = [
        *(job(run / precision, *how) for precision, how in precisions.items()),
        *(job(run / name, *arguments, *how) for name, how in SHAPES.items()),
        job(run / "muon", *muon),
        job(run / "changed", *muon, source=references / "muon", until=2),
        job(run / "poisoned", *arguments, nan_calls=[3]),
        job(run / "dropout", *dropout),
        job(run / "dropout-again", *dropout, source=run / "dropout", until=2),
    ]
    run_jobs(launchers.get(backend[0], backend[0]), backend[1], tmp_path, jobs)

    for precision, (loss, norm) in TOLERANCE.items():
        assert_same_run(run / precision, references / "adamw", loss=loss, norm=norm, weights=None)
        # Logits are fp32 in every precision. In bf16, a loss of 8 would be a multiple of 1/32.
        assert any(round(loss * 32) != loss * 32 for loss in metrics(run / precision, "train/loss"))
    exact = {"fp32": "adamw", "muon": "muon", "changed": "muon", **{name: name for name in SHAPES}}
    for name, reference in exact.items():
        assert_same_run(run / name, references / reference)

    # When one rank has a NaN, all ranks skip that step and continue.
    assert_same_weights(run / "poisoned", references / "poisoned")
    assert metrics(run / "poisoned", "train/loss")[4:] == pytest.approx(
        metrics(references / "poisoned", "train/loss")[4:], abs=1e-5
    )

    # On the same world and backend, a resumed run has the same bits.
    straight = CheckpointStore(run / "dropout").path(STEPS)
    again = CheckpointStore(run / "dropout-again").path(STEPS)
    assert verify(again)["files"] == verify(straight)["files"]


def test_run_passes_from_backend_to_backend(arguments: list[str], tmp_path: Path) -> None:
    """Another backend and world resumes the run every two steps; the result matches one process.

    The comparison includes moments, loss scale and stages. One run changes its batch shape where
    another backend resumes it.
    """
    relay: list[tuple[str | None, int]] = [
        ("zero2", 2),
        ("zero3", 3),
        ("zero1", 2),
        ("cpu", 2),
        (None, 1),
    ]
    total = 2 * len(relay)
    long = [*arguments, f"--training.max_steps={total}"]
    how = {
        "fp32": [*long, "--optimizer.name=muon"],
        "fp16": [*long, "--optimizer.name=muon", "--training.precision=fp16"],
        "stages": [*long, *SHAPES["stages"]],
    }
    one = tmp_path / "one"
    run = tmp_path / "relay"

    run_jobs(None, 1, tmp_path, [job(one / name, *settings) for name, settings in how.items()])
    for leg, (launcher, processes) in enumerate(relay, 1):
        printed = run_jobs(
            launcher,
            processes,
            tmp_path,
            [job(run / name, *settings) for name, settings in how.items()],
        )
        assert all(f"{total} steps, {2 * leg - 2} done" in of_one for of_one in printed)
        if leg == 1:
            assert (
                "from step 0 on: 20 sequences a step = 2 ranks x 2 micro-steps x 5" in printed[-1]
            )
            assert (
                "from step 4 on: 18 sequences a step = 2 ranks x 3 micro-steps x 3" in printed[-1]
            )
        for later in range(2 * leg + 2, total + 1, 2):
            for name in how:
                shutil.rmtree(CheckpointStore(run / name).path(later))

    assert_same_run(run / "fp32", one / "fp32")
    assert_same_run(run / "stages", one / "stages")
    loss, norm = TOLERANCE["fp16"]
    assert_same_run(run / "fp16", one / "fp16", loss=loss, norm=norm, weights=None)
    assert metrics(run / "fp16", "train/loss_scale") == [
        2.0**power for power in (14, 14, 14, 15, 15, 15, 16, 16, 16, 17)
    ]

    # Embedding and decoder share one matrix in the ZeRO-3 checkpoint and in its export.
    checkpoint = CheckpointStore(run / "fp32").path(4)
    config = load_config(run / "fp32" / "config.yaml")
    data = open_data(config)
    saved = checkpoint_tensors(run / "fp32", 4)
    assert len(list(checkpoint.glob("*.safetensors"))) == 3
    assert not any("decoder.weight" in name for name in saved)
    model = build_model(
        config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
    )
    load_weights(model, checkpoint)
    export(RunDir(run / "fp32", config, data), model, 4, tmp_path / "model")
    loaded = RobertaForMaskedLM.from_pretrained(tmp_path / "model")
    embedding = loaded.roberta.embeddings.word_embeddings.weight
    assert loaded.lm_head.decoder.weight is embedding
    assert torch.equal(
        embedding, torch.from_numpy(saved["roberta.embeddings.word_embeddings.weight"])
    )
