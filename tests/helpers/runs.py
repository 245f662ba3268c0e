"""What runs have written, and how far two of them are apart."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """All tensors of a checkpoint by name, whatever files they are in."""
    folder = CheckpointStore(run_dir).path(step)
    verify(folder)
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def metrics(run_dir: Path, name: str) -> list[float]:
    """One metric of a run, in the order of the steps, none missing or twice."""
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
    """Of all steps the losses and gradient norms, the scores, and the last weights and moments;
    None: not those.

    The tolerances are absolute: of a loss of 8 and gradient norms of 2, where two add up in another
    order.
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
    """All weights and moments of the last checkpoint."""
    last = CheckpointStore(reference).steps()[-1]
    assert len(metrics(run, "train/loss")) == last
    ours, theirs = state(run, last), state(reference, last)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert abs(tensor - theirs[name]).max() <= tolerance, name
