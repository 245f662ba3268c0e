"""The newest valid checkpoint is found, whatever was damaged, killed or superseded."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kantai.checkpoint.store import CheckpointStore, refuse_full_disk
from kantai.errors import UserError
from kantai.storage.atomic import manifest_entry, verify


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def make_checkpoints(run_dir: Path, *steps: int) -> CheckpointStore:
    """By the start of a run, which has superseded."""
    store = CheckpointStore(run_dir)
    store.supersede()
    for step in steps:
        write(store, step)
    return store


def write(store: CheckpointStore, step: int) -> None:
    folder = store.begin(step)
    (folder / "state").write_text(f"state {step}")
    store.publish(step, {"state": manifest_entry(folder / "state")})


def seen(store: CheckpointStore) -> list[str]:
    return [name for name in names(store.folder) if not name.startswith(".")]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.steps() == [] and store.newest_valid() is None


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 100_000_000, 20, 3, 100)
    for other in ("damaged-step-00000200", ".step-00000300.partial", "step-new"):
        (store.folder / other).mkdir()
    assert store.steps() == [3, 20, 100, 100_000_000]
    assert store.newest_valid() == (100_000_000, verify(store.path(100_000_000)))


def test_damaged_checkpoints_are_passed_over_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_checkpoints(tmp_path, 1, 2, 3)
    flip_a_bit(store.path(3) / "state")
    (store.path(2) / "manifest.json").unlink()

    found = store.newest_valid()
    assert found is not None and (found[0], found[1]["step"]) == (1, 1)
    assert store.steps() == [1, 2, 3]  # only looked at
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "checkpoint 3 is damaged and not used",
        "checkpoint 2 is damaged and not used",
    ]
    assert (
        "step-00000003/state fails its checksum" in said[0]
        and "step-00000002/manifest.json is missing" in said[1]
    )

    assert store.newest_valid(set_aside=True) == found
    assert seen(store) == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]
    write(store, 3)
    flip_a_bit(store.path(3) / "state")
    assert store.newest_valid(set_aside=True) == found  # a second time under the same name
    assert seen(store) == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]


def test_where_no_checkpoint_is_valid_all_are_left_as_they_are(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 1, 2)
    for step in (1, 2):
        (store.path(step) / "state").unlink()
    assert store.newest_valid(set_aside=True) is None and store.steps() == [1, 2]


@pytest.mark.parametrize("name", ["state", "manifest.json"])
def test_what_cannot_be_read_now_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    """As when a server is away or too many files are open; here, a link that leads to itself."""
    store = make_checkpoints(tmp_path, 1, 2)
    path = store.path(2) / name
    path.rename(tmp_path / "moved")
    path.symlink_to(path)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        store.newest_valid(set_aside=True)
    path.unlink()
    (tmp_path / "moved").rename(path)
    assert store.newest_valid(set_aside=True) == (2, verify(store.path(2)))


@pytest.mark.parametrize(
    ("keep", "left"),
    [(2, [30, 40]), (3, [20, 30, 40]), (4, [10, 20, 30, 40]), (9, [10, 20, 30, 40])],
)
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    store = make_checkpoints(tmp_path, 10, 20, 30, 40)
    store.prune(keep)
    assert store.steps() == left and len(seen(store)) == len(left)
    for step in left:
        verify(store.path(step))


def test_what_killed_processes_left_is_harmless_and_goes(tmp_path: Path) -> None:
    """A kill within prune or within a save leaves folders in that start's own; the next start
    removes them.
    """
    killed = make_checkpoints(tmp_path, 1, 2, 3)
    (killed.begin(4) / "state").write_text("half")
    (attempt,) = killed.folder.glob(".attempt-*")
    killed.path(1).rename(attempt / "pruned-1")

    store = CheckpointStore(tmp_path)
    assert store.steps() == [2, 3] and store.newest_valid() == (3, verify(store.path(3)))
    store.supersede()
    write(store, 4)
    store.prune(2)
    assert names(store.folder) == [".attempt-000002", ".starts", "step-00000003", "step-00000004"]
    assert not list((store.folder / ".attempt-000002").iterdir())


def test_who_was_taken_over_publishes_and_prunes_nothing(tmp_path: Path) -> None:
    """As on a node that was cut off and is back, wherever it was."""
    stale = make_checkpoints(tmp_path, 1, 2)
    half = stale.begin(3)
    (half / "state").write_text("of the stale one")
    entry = manifest_entry(half / "state")

    latest = make_checkpoints(tmp_path, 3)
    assert stale.is_superseded() and not latest.is_superseded()
    for change in (
        lambda: stale.publish(4, {"state": entry}),
        lambda: stale.begin(4),
        lambda: stale.prune(1),
    ):
        with pytest.raises(UserError, match="has been superseded by a later start"):
            change()
    assert latest.steps() == [1, 2, 3] and (latest.path(3) / "state").read_text() == "state 3"
    with pytest.raises(FileNotFoundError):
        (half / "state").write_text("still writing")


def test_of_several_starts_at_once_one_is_the_latest(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda store: store.supersede(), stores))
    assert sum(not store.is_superseded() for store in stores) == 1


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"GB free and a checkpoint takes .* GB more, or lower checkpoint.keep"
    ):
        refuse_full_disk(tmp_path, 2**60)
