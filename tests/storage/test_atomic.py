"""Tests that a sealed folder appears whole and verified or not at all, even after a kill."""

import os
import signal
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kantai.errors import UserError
from kantai.storage.atomic import (
    Damaged,
    digest,
    locked,
    read_manifest,
    refuse_url,
    staged,
    verify,
)
from tests.helpers.commands import ROOT, Program, run_python, wait_until


def seal(target: Path, **files: str) -> Path:
    with staged(target, kind="test") as folder:
        for name, content in files.items():
            (folder / name).write_text(content)
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_block_ends(tmp_path: Path) -> None:
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
            "b.txt": {
                "bytes": 0,
                "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            },
            "deep/a.bin": {
                "bytes": 3,
                "sha256": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3",
            },
        },
    }


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_files_get_umask_permissions(tmp_path: Path, umask: int) -> None:
    """safetensors makes files that only their owner may read."""
    before = os.umask(umask)
    try:
        with staged(tmp_path / "model") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "a").touch(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "deep" / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_block_leaves_no_files(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staged(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        raise failure
    assert names(tmp_path) == []


def test_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    target = seal(tmp_path / "model", a="first")
    with pytest.raises(UserError, match="model exists already; remove it or choose another output"):
        seal(target, a="second")
    assert (target / "a").read_text() == "first" and names(tmp_path) == ["model"]


def test_next_attempt_removes_folder_of_killed_one(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from kantai.storage.atomic import staged
with staged(pathlib.Path({str(tmp_path / "model")!r})) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".model.lock", ".model.partial"]
    seal(tmp_path / "model", a="whole")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["a", "manifest.json"]


def test_full_disk_is_one_line_error(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    code = f"""
import pathlib
from kantai.errors import run_command
from kantai.storage.atomic import staged
def main():
    with staged(pathlib.Path({str(tmp_path / "model")!r})) as folder:
        (folder / "first").write_text("fits")
        (folder / "second").symlink_to("/dev/full")
        (folder / "second").write_text("does not")
run_command(main)
"""
    ran = run_python(code)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        ran.stderr
        == "error: no space left on the device: free some and run the same command again\n"
    )
    assert names(tmp_path) == []


def test_digest_depends_on_values_alone() -> None:
    value = {"b": [1, 2.5, None], "a": {"y": "ä", "x": True}}
    assert digest(value) == digest({"a": {"x": True, "y": "ä"}, "b": [1, 2.5, None]})
    others = [
        {},
        [],
        "",
        None,
        value | {"c": 1},
        value | {"b": [2.5, 1, None]},
        value | {"b": ["1", 2.5, None]},
    ]
    assert len({digest(other) for other in [value, *others]}) == len(others) + 1


def flip_a_bit(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message", "without_hashes"),
    [
        (flip_a_bit, "fails its checksum", False),
        (append, "has 6 bytes, not 5", True),
        (Path.unlink, "is missing", True),
        (replace_by_folder, "is missing", True),
    ],
)
def test_damaged_file_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str, without_hashes: bool
) -> None:
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
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"files": []}',
        '{"files": {"a": 5}}',
        '{"files": {"a": {"bytes": 1}}}',
        "[" * 100_000,
    ],
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


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/x",
        "gs://bucket",
        "hf://datasets/me/x",
        "https://example.org/x",
        "file:///tmp/x",
    ],
)
def test_url_is_no_place_to_write(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a URL: write to a local folder"), staged(Path(url)):
        pass
    assert names(tmp_path) == []


def test_data_set_of_the_hub_is_no_place_to_write() -> None:
    with pytest.raises(UserError, match="hub:me/x is a URL"):
        refuse_url(Path("hub:me/x"))


@pytest.mark.parametrize("path", ["a", "./s3:", "/tmp/s3:/x", "runs/12:30", "a:b/c", "."])
def test_local_path_is_a_place_to_write(path: str) -> None:
    refuse_url(Path("x") / path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a lock that another process holds within a second."""
    monkeypatch.setattr("kantai.storage.atomic._LOCK_WAIT_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_lock_is_held_by_one_or_shared_by_several(tmp_path: Path) -> None:
    target = tmp_path / "shards"
    busy = "another process is writing .*/shards: wait for it"
    with locked(target, shared=True):
        with locked(target, shared=True):
            with pytest.raises(UserError, match=busy), locked(target):
                pass
        with pytest.raises(UserError, match=busy), locked(target):
            pass
    with locked(target):
        for shared in (True, False):
            with pytest.raises(UserError, match=busy), locked(target, shared=shared):
                pass
    assert names(tmp_path) == []


def test_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    """Its last holder removes the file while a next one has it open already."""
    with locked(tmp_path / "shards"):
        (tmp_path / ".shards.lock").unlink()
        with locked(tmp_path / "shards"):
            assert (tmp_path / ".shards.lock").exists()
    assert names(tmp_path) == []


def holder_of_lock(target: Path, seconds: float) -> Program:
    """Return a process that holds the lock of an output for some seconds, and then is killed."""
    code = f"""
import os, pathlib, signal, time
from kantai.storage.atomic import locked
with locked(pathlib.Path({str(target)!r})):
    print("held", flush=True)
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    holder = Program([sys.executable, "-c", code], PYTHONPATH=str(ROOT))
    wait_until(lambda: "held" in holder.out, holder)
    return holder


@pytest.mark.parametrize("shared", [True, False])
def test_lock_of_a_dying_process_is_waited_for(
    shared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file server takes a dead node for alive until its lease ends."""
    holder = holder_of_lock(tmp_path / "shards", 4.5)
    with locked(tmp_path / "shards", shared=shared):
        assert holder.wait_for_end() == -signal.SIGKILL
    said = f"another process is writing {tmp_path / 'shards'}: waiting 120 seconds for it at most"
    assert capsys.readouterr().out.splitlines() == [said]
    assert names(tmp_path) == []


def test_lock_that_is_held_for_a_moment_is_waited_for_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last of several parts holds the lock alone while it removes the file."""
    holder_of_lock(tmp_path / "shards", 0.5)
    with locked(tmp_path / "shards", shared=True):
        pass
    assert capsys.readouterr().out == ""


def test_parts_that_begin_while_others_end_get_the_lock(tmp_path: Path) -> None:
    """Each part shares the lock, and the last to leave tries to hold it alone."""

    def take_often() -> None:
        for _ in range(300):
            with locked(tmp_path / "shards", shared=True):
                pass

    with ThreadPoolExecutor(4) as threads:
        taken = [threads.submit(take_often) for _ in range(4)]
    assert [each.exception() for each in taken] == [None] * 4
    assert names(tmp_path) == []
