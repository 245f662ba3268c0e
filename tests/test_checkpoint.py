"""Nothing half-written: a folder is there whole and verified, or not at all, whenever the process that writes it dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kantai import UserError
from kantai.checkpoint import CheckpointStore, Damaged, digest, read_manifest, record, refuse_full_disk, staged, verify

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("RANK", None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def seal(target: Path, **files: str) -> Path:
    with staged(target, kind="test") as folder:
        for name, content in files.items():
            (folder / name).write_text(content)
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "model"
    with staged(target, kind="test", about="ä") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.bin").write_bytes(b"123")
        (folder / "b.txt").write_text("")
        assert not target.exists()
    assert names(target.parent) == ["model"]
    assert names(target) == ["b.txt", "deep", "manifest.json"]
    assert verify(target) == {
        "kind": "test",
        "about": "ä",
        "files": {
            "b.txt": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
            "deep/a.bin": {"bytes": 3, "sha256": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"},
        },
    }


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staged(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        raise failure
    assert names(tmp_path) == []


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    target = seal(tmp_path / "model", a="first")
    with pytest.raises(UserError, match="model exists already; remove it or choose another output"):
        seal(target, a="second")
    assert (target / "a").read_text() == "first" and names(tmp_path) == ["model"]


def test_sigkill_leaves_a_hidden_folder_that_the_next_attempt_removes(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from kantai.checkpoint import staged
with staged(pathlib.Path({str(tmp_path / "model")!r})) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".model.partial"]
    seal(tmp_path / "model", a="whole")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["a", "manifest.json"]


def test_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    code = f"""
import pathlib
from kantai import run_command
from kantai.checkpoint import staged
def main():
    with staged(pathlib.Path({str(tmp_path / "model")!r})) as folder:
        (folder / "first").write_text("fits")
        (folder / "second").symlink_to("/dev/full")
        (folder / "second").write_text("does not")
run_command(main)
"""
    ran = run_python(code)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: no space left on the device: free some and run the same command again\n"
    assert names(tmp_path) == []


def test_full_disk_is_said_in_one_line_by_a_library_written_in_rust(tmp_path: Path) -> None:
    """Such libraries raise exceptions of their own, not OSError."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    code = f"""
import pathlib
from kantai import run_command
from kantai.tokenizer import save_tokenizer, train_tokenizer
run_command(lambda: save_tokenizer(train_tokenizer(["a"], 261, 2), pathlib.Path({str(tmp_path)!r})))
"""
    ran = run_python(code)
    assert (ran.returncode, ran.stderr) == (2, "error: no space left on the device: free some and run the same command again\n")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("UserError('two\\nlines')", "error: two lines\n"),
        # What safetensors raises on a full disk.
        (
            "__import__('safetensors').SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')",
            "error: no space left on the device: free some and run the same command again\n",
        ),
        ("PermissionError(13, 'Permission denied', '/root/x')", "error: Permission denied: /root/x\n"),
        (
            "OSError(28, 'No space left on device', '/data/x')",
            "error: no space left on /data/x: free some and run the same command again\n",
        ),
    ],
)
def test_commands_fail_in_one_line(raised: str, message: str) -> None:
    ran = run_python(f"from kantai import UserError, run_command\ndef main():\n    raise {raised}\nrun_command(main)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", message)


def test_a_bug_is_not_dressed_up_as_bad_input() -> None:
    ran = run_python("from kantai import run_command\ndef main():\n    raise RuntimeError('a bug')\nrun_command(main)")
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "RuntimeError: a bug" in ran.stderr


def test_digest_depends_on_values_alone() -> None:
    value = {"b": [1, 2.5, None], "a": {"y": "ä", "x": True}}
    assert digest(value) == digest({"a": {"x": True, "y": "ä"}, "b": [1, 2.5, None]})
    others = [{}, [], "", None, value | {"c": 1}, value | {"b": [2.5, 1, None]}, value | {"b": ["1", 2.5, None]}]
    assert len({digest(other) for other in [value, *others]}) == len(others) + 1


def flip_a_bit(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message", "without_hashes"),
    [
        (flip_a_bit, "fails its checksum", False),
        (append, "has 6 bytes, not 5", True),
        (Path.unlink, "is missing", True),
        (be_a_folder, "is missing", True),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str, without_hashes: bool) -> None:
    target = seal(tmp_path / "model", a="first", b="other")
    damage(target / "b")
    with pytest.raises(Damaged, match=f"{target / 'b'} {message}"):
        verify(target)
    if without_hashes:
        with pytest.raises(Damaged, match=f"{target / 'b'} {message}"):
            verify(target, hashes=False)
    else:
        assert verify(target, hashes=False)["kind"] == "test"


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"a": 5}}', '{"files": {"a": {"bytes": 1}}}', "[" * 100_000]
)
def test_damaged_manifest_is_named(tmp_path: Path, content: str | None) -> None:
    target = seal(tmp_path / "model", a="first")
    if content is None:
        (target / "manifest.json").unlink()
    else:
        (target / "manifest.json").write_text(content)
    for reading in (read_manifest, verify):
        with pytest.raises(Damaged, match=r"model/manifest\.json is missing or unreadable"):
            reading(target)


def make_checkpoints(run_dir: Path, *updates: int) -> CheckpointStore:
    """By the start of a run, which has taken over."""
    store = CheckpointStore(run_dir)
    store.take_over()
    for update in updates:
        write(store, update)
    return store


def write(store: CheckpointStore, update: int) -> None:
    folder = store.stage(update)
    (folder / "state").write_text(f"state {update}")
    store.publish(update, {"state": record(folder / "state")})


def seen(store: CheckpointStore) -> list[str]:
    return [name for name in names(store.folder) if not name.startswith(".")]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.updates() == [] and store.newest_valid() is None


def test_checkpoints_are_in_the_order_of_their_updates(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 100_000_000, 20, 3, 100)
    for other in ("damaged-update-00000200", ".update-00000300.partial", "update-new"):
        (store.folder / other).mkdir()
    assert store.updates() == [3, 20, 100, 100_000_000]
    assert store.newest_valid() == (100_000_000, verify(store.path(100_000_000)))


def test_damaged_checkpoints_are_passed_over_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_checkpoints(tmp_path, 1, 2, 3)
    flip_a_bit(store.path(3) / "state")
    (store.path(2) / "manifest.json").unlink()

    found = store.newest_valid()
    assert found is not None and (found[0], found[1]["update"]) == (1, 1)
    assert store.updates() == [1, 2, 3]  # only looked at
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["checkpoint 3 is damaged and not used", "checkpoint 2 is damaged and not used"]
    assert "update-00000003/state fails its checksum" in said[0] and "update-00000002/manifest.json is missing" in said[1]

    assert store.newest_valid(set_aside=True) == found
    assert seen(store) == ["damaged-update-00000002", "damaged-update-00000003", "update-00000001"]
    write(store, 3)
    flip_a_bit(store.path(3) / "state")
    assert store.newest_valid(set_aside=True) == found  # a second time under the same name
    assert seen(store) == ["damaged-update-00000002", "damaged-update-00000003", "update-00000001"]


def test_where_no_checkpoint_is_valid_all_are_left_as_they_are(tmp_path: Path) -> None:
    store = make_checkpoints(tmp_path, 1, 2)
    for update in (1, 2):
        (store.path(update) / "state").unlink()
    assert store.newest_valid(set_aside=True) is None and store.updates() == [1, 2]


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


@pytest.mark.parametrize(("keep", "left"), [(2, [30, 40]), (3, [20, 30, 40]), (4, [10, 20, 30, 40]), (9, [10, 20, 30, 40])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    store = make_checkpoints(tmp_path, 10, 20, 30, 40)
    store.prune(keep)
    assert store.updates() == left and len(seen(store)) == len(left)
    for update in left:
        verify(store.path(update))


def test_what_killed_processes_left_is_harmless_and_goes(tmp_path: Path) -> None:
    """A kill within prune or within a save leaves folders in that start's own; the next start removes them."""
    killed = make_checkpoints(tmp_path, 1, 2, 3)
    (killed.stage(4) / "state").write_text("half")
    (attempt,) = killed.folder.glob(".attempt-*")
    killed.path(1).rename(attempt / "pruned-1")

    store = CheckpointStore(tmp_path)
    assert store.updates() == [2, 3] and store.newest_valid() == (3, verify(store.path(3)))
    store.take_over()
    write(store, 4)
    store.prune(2)
    assert names(store.folder) == [".attempt-000002", ".starts", "update-00000003", "update-00000004"]
    assert not list((store.folder / ".attempt-000002").iterdir())


def test_who_was_taken_over_publishes_and_prunes_nothing(tmp_path: Path) -> None:
    """As on a node that was cut off and is back, wherever it was."""
    stale = make_checkpoints(tmp_path, 1, 2)
    half = stale.stage(3)
    (half / "state").write_text("of the stale one")
    entry = record(half / "state")

    latest = make_checkpoints(tmp_path, 3)
    assert stale.is_taken_over() and not latest.is_taken_over()
    for change in (lambda: stale.publish(4, {"state": entry}), lambda: stale.stage(4), lambda: stale.prune(1)):
        with pytest.raises(UserError, match="has been taken over by a later start"):
            change()
    assert latest.updates() == [1, 2, 3] and (latest.path(3) / "state").read_text() == "state 3"
    with pytest.raises(FileNotFoundError):
        (half / "state").write_text("still writing")


def test_of_several_starts_at_once_one_is_the_latest(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda store: store.take_over(), stores))
    assert sum(not store.is_taken_over() for store in stores) == 1


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path, 1)
    with pytest.raises(UserError, match=r"GB free and a checkpoint takes .* GB more, or lower checkpoint.keep"):
        refuse_full_disk(tmp_path, 2**60)
