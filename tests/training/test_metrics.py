"""Only the latest start of a run writes metrics. A failed write is an error."""

import json
from pathlib import Path

import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError
from kantai.training.metrics import Metrics
from tests.helpers.commands import run_python


def superseding_start(run: Path) -> CheckpointStore:
    store = CheckpointStore(run)
    store.supersede()
    return store


def test_superseded_start_leaves_metrics_alone(tmp_path: Path) -> None:
    """A start that loads its checkpoint slowly opens the metrics late."""
    stale = superseding_start(tmp_path)
    latest = superseding_start(tmp_path)
    metrics = Metrics(tmp_path, latest, 1, 0.0)
    metrics.log(1, {"train/loss": 7.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has been superseded by a later start"):
        Metrics(tmp_path, stale, 1, 0.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    metrics.log(2, {"train/loss": 6.0})
    metrics.finish()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_last_values_omit_skipped_steps(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, superseding_start(tmp_path), 1, 0.0)
    for step, (loss, skipped) in enumerate(
        [(7.0, 0.0), (999.0, 1.0), (float("nan"), 1.0), (6.0, 0.0), (5.0, 0.0)], 1
    ):
        metrics.log(step, {"train/loss": loss, "train/skipped": skipped})
    metrics.finish()
    assert metrics.last("train/loss", 2) == [6.0, 5.0]
    assert metrics.last("train/loss", 9) == [7.0, 6.0, 5.0]


@pytest.mark.parametrize("what", ["metrics", "TensorBoard"])
def test_failed_write_ends_program(what: str, tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from kantai.checkpoint.store import CheckpointStore
from kantai.training.metrics import Metrics, TensorBoard

run = Path({str(tmp_path)!r})
store = CheckpointStore(run)
store.supersede()
metrics = Metrics(run, store, 1, 0.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(1, 1000):
    if {what!r} == "metrics":
        metrics.log(step, {{"train/loss": 7.0}})
    else:
        metrics.log_text(step, "fill_mask", "x" * 1000)
"""
    done = run_python(code)
    assert done.returncode == 1 and "File too large" in done.stderr, done
