"""Read and compare the files of runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Any]:
    """Return all tensors of a checkpoint by name, from all its files."""
    folder = CheckpointStore(run_dir).path(step)
    verify(folder)
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def metrics(run_dir: Path, name: str) -> list[float]:
    """Return one metric of a run in the order of steps.

    A ``train/`` metric must have each step once.
    """
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    found = [(record["step"], record[name]) for record in records if name in record]
    if name.startswith("train/"):
        assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]


def assert_same_run(
    run: Path,
    reference: Path,
    *,
    loss: float = 1e-5,
    norm: float = 1e-5,
    weights: float | None = 1e-4,
) -> None:
    """Fail unless two runs have the same losses, gradient norms, scores and last checkpoint.

    The tolerances are absolute, for a loss of about 8 and gradient norms of about 2, where sums may
    have another order. ``weights=None`` leaves the checkpoint out.
    """
    for name, tolerance in (
        ("train/loss", loss),
        ("train/grad_norm", norm),
        ("held_out/loss", loss),
    ):
        assert metrics(run, name) == pytest.approx(metrics(reference, name), abs=tolerance), name
    if weights is not None:
        assert_same_weights(run, reference, weights)


def assert_same_weights(run: Path, reference: Path, tolerance: float = 1e-4) -> None:
    """Fail unless the last checkpoints of two runs have the same weights and moments."""
    last = CheckpointStore(reference).steps()[-1]
    assert len(metrics(run, "train/loss")) == last
    tensors = checkpoint_tensors(run, last)
    expected = checkpoint_tensors(reference, last)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert abs(tensor - expected[name]).max() <= tolerance, name
