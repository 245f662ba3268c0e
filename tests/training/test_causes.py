"""An error of the system is said as it is, or waited out, and no good data is blamed for it."""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.shards import open_shards
from kantai.errors import UserError
from kantai.storage import atomic
from kantai.storage.atomic import manifest_entry, verify
from kantai.training.run_dir import open_run_dir
from tests.helpers.commands import CONFIG, TINY, pretrain


@contextmanager
def room_for_files(number: int) -> Iterator[None]:
    """Let this process open so many files more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def failing_open(path: Path, failures: list[int]) -> Iterator[None]:
    """Have a file fail to open with these errors of the system, one after the other."""
    real = Path.open

    def failing(self: Path, *rest: Any, **named: Any) -> Any:
        if self == path and failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *rest, **named)

    with patch.object(Path, "open", failing), patch.object(atomic, "_PAUSES_SECONDS", (0, 0, 0)):
        yield


def make_store(run: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(run)
    store.supersede()
    for step in steps:
        folder = store.begin(step)
        (folder / "state").write_text(f"state {step}")
        store.publish(step, {"state": manifest_entry(folder / "state")})
    return store


def test_shards_beyond_limit_of_open_files_are_read(many_shards_dir: Path) -> None:
    """Each mapped shard holds a file open. The least recently used are closed for the others."""
    split = open_shards(many_shards_dir).splits["train"]
    expected = [shard.tokens.sum() for shard in split]
    split = open_shards(many_shards_dir).splits["train"]
    with room_for_files(8):
        found = [split[number].tokens.sum() for number in [*range(len(split)), 0]]
    assert len(split) > 8 and found == [*expected, expected[0]]


@pytest.mark.parametrize("room", [0, 1])
def test_too_many_open_files_are_no_damaged_shards(room: int, many_shards_dir: Path) -> None:
    """With room for one, the file is opened, and mapping it fails."""
    split = open_shards(many_shards_dir).splits["train"]
    with room_for_files(room), pytest.raises(OSError, match="Too many open files") as error:
        split[0]
    assert error.value.filename is not None and split.files[0] in error.value.filename


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["state", "manifest.json"])
def test_passing_error_sets_no_checkpoint_aside(number: int, name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, 1, 2)
    failures = [number, number]
    with failing_open(store.path(2) / name, failures):
        found = store.newest_valid(set_aside=True)
    assert not failures and found == (2, verify(store.path(2)))


def test_lasting_error_of_disk_sets_checkpoint_aside(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1, 2)
    with failing_open(store.path(2) / "state", [errno.EIO] * 4):
        found = store.newest_valid(set_aside=True)
    assert found == (1, verify(store.path(1)))
    assert (store.folder / "damaged-step-00000002").is_dir()


@pytest.mark.parametrize("leftover", [".DS_Store", ".nfs000012", ".snapshot/", "lost+found/"])
def test_leftover_of_system_blocks_no_run_directory(
    leftover: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / leftover).mkdir() if leftover.endswith("/") else (run / leftover).touch()
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    config = load_config(CONFIG, [*TINY, *where, f"--run_dir={run}"])
    open_run_dir(config, open_data(config))

    (run / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is no run directory"):
        open_run_dir(config, open_data(config))


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other disk here")
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


def test_checkpoints_may_be_linked_to_other_disk(
    other_disk: Path, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    arguments = [*where, f"--run_dir={run}", "--checkpoint.every_steps=2"]
    pretrain(None, *arguments, "--training.max_steps=4", "--checkpoint.keep=9")
    moved = shutil.copytree(run / "checkpoints", other_disk / "checkpoints")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(moved)
    shutil.rmtree(moved / "step-00000004")
    printed = pretrain(None, *arguments, "--training.max_steps=4", "--checkpoint.keep=9")
    assert "4 steps, 2 done" in printed
    assert CheckpointStore(run).steps() == [2, 4] and (moved / "step-00000004").is_dir()


def test_superseded_start_replaces_no_file_beside_linked_checkpoints(
    other_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(other_disk)
    stale = make_store(tmp_path)
    with stale.replaced(tmp_path / "metrics.jsonl") as partial:
        partial.write_text("stale")
    latest = make_store(tmp_path)
    with (
        pytest.raises(UserError, match="has been superseded by a later start"),
        stale.replaced(tmp_path / "metrics.jsonl") as partial,
    ):
        partial.write_text("stale again")
    with latest.replaced(tmp_path / "metrics.jsonl") as partial:
        partial.write_text("latest")
    assert (tmp_path / "metrics.jsonl").read_text() == "latest"


def test_link_of_checkpoints_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="a link that leads nowhere"):
        CheckpointStore(tmp_path).supersede()
