"""An error of a loader's process reads like one of the run's own process."""

import re
import shutil
from pathlib import Path

import pytest

from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.loader import stream
from kantai.errors import UserError
from tests.helpers.commands import CONFIG, TINY


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shards_raise_equal_error_in_workers(
    workers: int, many_shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(many_shards_dir, tmp_path / "shards")
    where = [
        f"--data.shards={shards}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    config = load_config(
        CONFIG, [*TINY, *where, "--data.verify_hashes=false", "--training.max_steps=6"]
    )
    batches = open_data(config).training_batches(1)
    for path in shards.glob("train*.arrow"):
        path.write_bytes(bytes(path.stat().st_size))
    try:
        next(stream(batches, 0, 0, 1, workers))
        pytest.fail("the damaged shards were read")
    except UserError as error:
        assert re.fullmatch(r"damaged shards: [^\n]*", str(error))
        # The error and the frame that raised it refer to each other. In a later test, the garbage
        # collector would free the loader's queues before the loader tells its processes to end.
        # It would then wait for the processes: 20 seconds, or forever at the session's end.
        error.__traceback__ = None
