"""The store finds the newest valid checkpoint after damage, kills and superseded starts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kantai.checkpoint.store import CheckpointStore, refuse_full_disk
from kantai.errors import UserError
from kantai.storage.atomic import manifest_entry, verify


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def make_checkpoints(run_dir: Path, *steps: int) -> CheckpointStore:
    """Write checkpoints as a start that has superseded the earlier ones."""
    store = CheckpointStore(run_dir)
    store.supersede()
    for step in steps:
        write(store, step)
    return store


def write(store: CheckpointStore, step: int) -> None:
    folder = store.begin(step)
    (folder / "state").write_text(f"state {step}")
    store.publish(step, {"state": manifest_entry(folder / "state")})


def visible(store: CheckpointStore) -> list[str]:
    return [name for name in names(store.folder) if not name.startswith(".")]


def test_empty_run_has_no_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.steps() == [] and store.newest_valid() is None


def test_store_lists_checkpoints_by_step(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 100_000_000, 20, 3, 100)
    for other in ("damaged-step-00000200", ".step-00000300.partial", "step-new"):
        (store.folder / other).mkdir()
    assert store.steps() == [3, 20, 100, 100_000_000]
    assert store.newest_valid() == (100_000_000, verify(store.path(100_000_000)))


def test_store_sets_damaged_checkpoints_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_checkpoints(tmp_path, 1, 2, 3)
    flip_bit(store.path(3) / "state")
    (store.path(2) / "manifest.json").unlink()

    found = store.newest_valid()
    assert found is not None and (found[0], found[1]["step"]) == (1, 1)
    assert store.steps() == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "checkpoint 3 is damaged and not used",
        "checkpoint 2 is damaged and not used",
    ]
    assert (
        "step-00000003/state fails its checksum" in lines[0]
        and "step-00000002/manifest.json is missing" in lines[1]
    )

    assert store.newest_valid(set_aside=True) == found
    assert visible(store) == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]

    # damaged-step-00000003 exists already.
    write(store, 3)
    flip_bit(store.path(3) / "state")
    assert store.newest_valid(set_aside=True) == found
    assert visible(store) == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]


def test_store_without_valid_checkpoint_changes_nothing(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 1, 2)
    for step in (1, 2):
        (store.path(step) / "state").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert store.newest_valid(set_aside=True) is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["state", "manifest.json"])
def test_unreadable_checkpoint_is_not_set_aside(name: str, tmp_path: Path) -> None:
    """A server may be away, or too many files open. A link to itself stands for both."""
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
def test_prune_keeps_newest_checkpoints(tmp_path: Path, keep: int, left: list[int]) -> None:
    store = make_checkpoints(tmp_path, 10, 20, 30, 40)
    store.prune(keep)
    assert store.steps() == left and len(visible(store)) == len(left)
    for step in left:
        verify(store.path(step))


def test_next_start_removes_leftovers_of_killed_one(tmp_path: Path) -> None:
    """A kill in a prune or a save leaves folders in the start's own attempt folder."""
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


def test_superseded_start_changes_no_checkpoints(tmp_path: Path) -> None:
    """The superseded start may be on a node that was cut off and is back."""
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


def test_one_of_concurrent_starts_supersedes_others(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda store: store.supersede(), stores))
    assert sum(not store.is_superseded() for store in stores) == 1


def test_checkpoint_larger_than_free_space_is_refused(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"GB free and a checkpoint takes .* GB more, or lower checkpoint.keep"
    ):
        refuse_full_disk(tmp_path, 2**60)


def write_scored(store: CheckpointStore, step: int, loss: float) -> None:
    folder = store.begin(step)
    (folder / "state").write_text(f"state {step}")
    store.publish(step, {"state": manifest_entry(folder / "state")}, held_out_loss=loss)


def test_prune_keeps_best_checkpoint(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 5)
    assert store.best() is None
    for step, loss in ((10, 4.0), (20, 3.0), (30, 3.5), (40, 3.25), (50, 3.75)):
        write_scored(store, step, loss)
        store.prune(2)
    assert store.steps() == [20, 40, 50] and store.best() == 20
    write_scored(store, 60, 3.0)  # the later one of two that are equal
    store.prune(2)
    assert store.steps() == [50, 60] and store.best() == 60


def test_damaged_best_checkpoint_is_not_best(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path)
    write_scored(store, 10, 3.0)
    write_scored(store, 20, 4.0)
    flip_bit(store.path(10) / "manifest.json")
    assert store.best() == 20


def test_copies_of_checkpoint_folders_are_no_checkpoints(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 10)
    for name in ("step-00000010 (conflicted copy)", "step-11", "step-00000012.sync-conflict"):
        (store.folder / name).mkdir()
    assert store.steps() == [10]


def test_newest_outlives_pruning_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader finds checkpoints, and a start that is at work prunes them before it reads them."""
    store = make_checkpoints(tmp_path, 1, 2)
    reader = CheckpointStore(tmp_path)
    listed = reader.steps()
    write(store, 3)
    write(store, 4)
    store.prune(2)
    stale = iter([listed])
    fresh = reader.steps
    monkeypatch.setattr(reader, "steps", lambda: next(stale, None) or fresh())
    assert reader.newest_valid() == (4, verify(store.path(4)))
    assert capsys.readouterr().out == ""


def test_manifest_gives_recent_values(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 5)
    assert store.recent("train/loss", 5) == []
    for step, recent in ((6, {"train/loss": [2.5, 3.0]}), (7, ["a"]), (8, {"train/loss": None})):
        folder = store.begin(step)
        (folder / "state").write_text("state")
        store.publish(step, {"state": manifest_entry(folder / "state")}, recent=recent)
    assert [store.recent("train/loss", step) for step in (6, 7, 8)] == [[2.5, 3.0], [], []]


def test_published_checkpoint_is_scored_by_latest_start_alone(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 10, 20)
    before = verify(store.path(10))
    store.score(10, 3.0)
    assert store.scores() == {10: 3.0} and store.best() == 10
    assert store.verify(10) == before | {"held_out_loss": 3.0}
    assert names(store.path(10)) == ["manifest.json", "state"]

    later = make_checkpoints(tmp_path)
    with pytest.raises(UserError, match="has been superseded by a later start"):
        store.score(20, 2.0)
    assert later.scores() == {10: 3.0}
    flip_bit(later.path(20) / "manifest.json")
    later.score(20, 2.0)  # what is damaged is not sealed anew
    assert later.scores() == {10: 3.0}
    later.score(30, 2.0)
    assert later.steps() == [10, 20]
