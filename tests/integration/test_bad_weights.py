"""All ranks go back together when the weights of one are not finite, under every backend."""

import json
from pathlib import Path

import numpy as np
import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify
from tests.helpers.commands import TINY, job, run_jobs
from tests.helpers.runs import checkpoint_tensors, metrics

pytestmark = pytest.mark.slow

STEPS = 6


def windows(run: Path) -> list[dict[str, int]]:
    text = (run / "skipped_data.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("launcher", ["cpu", "zero0", "zero2", "zero3"])
def test_ranks_go_back_before_infinite_weight_of_one(
    launcher: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A run that went back to step 0 ends with the bits of one that knew what to skip."""
    arguments = [
        "--config=configs/quickstart.yaml",
        *TINY,
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--training.max_steps={STEPS}",
        "--checkpoint.every_steps=2",
        "--checkpoint.keep=9",
    ]
    begun_anew = tmp_path / "begun_anew"
    replayed = tmp_path / "replayed"
    ended = tmp_path / "ended"
    jobs = [
        job(begun_anew, *arguments, fault="poisoned_weight"),
        job(replayed, *arguments, source=begun_anew, until=0),
        job(ended, *arguments, fault="poisoned_weight_at_the_end"),
    ]
    printed = run_jobs(launcher, 2, tmp_path, jobs)

    assert "back to step 0; the data of steps 0 to 0 is skipped" in printed[0]
    assert windows(begun_anew) == [{"from_step": 0, "first": 0, "stop": 1}]
    files = [verify(CheckpointStore(run).path(STEPS))["files"] for run in (begun_anew, replayed)]
    assert files[0] == files[1]
    assert metrics(begun_anew, "train/loss") == metrics(replayed, "train/loss")

    assert "back to step 4; the data of steps 4 to 5 is skipped" in printed[2]
    assert CheckpointStore(ended).steps() == [2, 4, 6]
    for step in (2, 4, 6):
        for name, tensor in checkpoint_tensors(ended, step).items():
            assert np.isfinite(tensor).all(), (step, name)
