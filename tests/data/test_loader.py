"""What goes wrong in a loader's process is said as it is in the run's own."""

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
def test_what_is_wrong_with_the_data_is_said_as_it_is_by_loader_processes_too(
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
        pytest.fail("was read")
    except UserError as error:
        assert re.fullmatch(r"damaged shards: [^\n]*", str(error))
        # The error and the frame that raised it hold each other. The garbage collector, in some
        # later test, would take the loader's queues away before its processes are told to end, and
        # then wait for them: 20 seconds, or at the session's end for ever.
        error.__traceback__ = None
