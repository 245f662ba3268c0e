"""A corpus becomes the same shards to the byte, however the work is divided and however often it is killed."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import ENVIRONMENT, ROOT, script

from kantai import UserError, tokenizing
from kantai.corpus import pieces
from kantai.files import find_files
from kantai.shards import SHARD_TOKENS, SPLITS, open_shards
from kantai.tokenizing import Job, merge, tokenize

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> MakeJob:
    """Jobs of many pieces: the text's lines, most of them once and some often."""

    def make(name: str, *, piece_bytes: int = 20_000, unique: bool = False, files: list[Path] | None = None) -> Job:
        cut = pieces(find_files([str(file) for file in files or [corpus_file]]), "line", piece_bytes)
        return Job(cut, "line", "text", tokenizer_dir, tmp_path / name, {"input": ["x"]}, held_out_share=0.1, unique=unique)

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(folder: Path, split: str, vocabulary_dir: Path) -> list[tuple[int, ...]]:
    shards = open_shards(folder).splits[split]
    return [tuple(document.tolist()) for shard in shards for document in np.split(shard.tokens, shard.boundaries[1:-1])]


@pytest.mark.parametrize("unique", [False, True])
def test_any_number_of_processes_and_parts_gives_the_same_bytes(make_job: MakeJob, unique: bool) -> None:
    alone = make_job("alone", unique=unique)
    assert len(alone.pieces) > 10
    tokenize(alone, processes=1)
    merge(alone)

    together = make_job("together", unique=unique)
    tokenize(together, processes=3)
    merge(together)

    in_parts = make_job("in_parts", unique=unique)
    for part, processes in ((2, 1), (0, 2), (1, 1)):
        assert not in_parts.output.exists()
        tokenize(in_parts, part=part, parts=3, processes=processes)
    merge(in_parts)

    assert content(alone.output) == content(together.output) == content(in_parts.output)
    assert {path.name for path in alone.output.parent.iterdir()} == {"alone", "together", "in_parts"}


def test_killed_at_any_time_it_redoes_what_was_not_done_and_nothing_else(make_job: MakeJob, tmp_path: Path, corpus_file: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_text(corpus_file.read_text(encoding="utf-8") * 60, encoding="utf-8")  # 5 pieces of 4 MiB
    tokenizer = make_job("x").tokenizer
    arguments = ["scripts/tokenize_corpus.py", "--input", large, "--tokenizer", tokenizer, "--processes", "2", "--output"]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *map(str, arguments), str(tmp_path / name)], cwd=ROOT, env=ENVIRONMENT)

    pieces_of_killed = tmp_path / ".killed.partial" / "pieces"
    finished: dict[str, int] = {}
    for _ in range(2):  # each time one piece is done, or two that end at once
        with start("killed") as process:
            while len(list(pieces_of_killed.glob("*.json"))) <= len(finished):
                time.sleep(0.01)
                assert process.poll() is None
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=20)[1]  # its children end with it
        for name, modified in finished.items():
            assert (pieces_of_killed / name).stat().st_mtime_ns == modified
        finished = {path.name: path.stat().st_mtime_ns for path in pieces_of_killed.glob("*.json")}
        assert len(finished) < 5 and not (tmp_path / "killed").exists()
    assert start("killed").wait() == start("undisturbed").wait() == 0
    assert content(tmp_path / "killed").keys() == content(tmp_path / "undisturbed").keys()
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


def test_a_merge_waits_for_all_parts(make_job: MakeJob) -> None:
    job = make_job("shards")
    tokenize(job, part=1, parts=2)
    with pytest.raises(UserError, match=rf"{len(job.pieces[::2])} of {len(job.pieces)} pieces are not tokenized yet \(0, 2, 4, "):
        merge(job)
    assert not job.output.exists()
    tokenize(job, part=0, parts=2)
    merge(job)
    assert job.output.exists()


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("step", ["write_shard", "publish", "record"])
def test_a_merge_that_broke_off_is_done_again(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, unique: bool, step: str) -> None:
    whole, broken = make_job("whole", unique=unique), make_job("broken", unique=unique)
    for job in (whole, broken):
        tokenize(job)
    merge(whole)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, step, fail)
        if step != "write_shard" or unique:
            with pytest.raises(KeyboardInterrupt):
                merge(broken)
            assert not broken.output.exists()
    merge(broken)
    assert content(broken.output) == content(whole.output)


def test_only_what_changed_is_tokenized_again(make_job: MakeJob, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for number, file in enumerate(files):
        file.write_text("".join(f"line {line} of file {number}\n" for line in range(500)), encoding="utf-8")
    tokenize(make_job("shards", piece_bytes=5000, files=files))
    work = make_job("shards", piece_bytes=5000, files=files).work
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.json")}
    files[2].write_text(files[2].read_text(encoding="utf-8").replace("line", "LINE"), encoding="utf-8")
    os.utime(files[2], (1, 1))

    job = make_job("shards", piece_bytes=5000, files=files)
    tokenize(job)
    redone = {name for name, modified in before.items() if (work / name).stat().st_mtime_ns != modified}
    assert redone == {
        f"{number:06d}.json" for number, piece in enumerate(job.pieces) if any(span.file.path.endswith("2.txt") for span in piece)
    }
    assert 0 < len(redone) < len(before)
    assert merge(job)["report"]["documents"] == 2000

    other = replace(make_job("other", piece_bytes=5000, files=files), held_out_share=0.2)
    tokenize(make_job("other", piece_bytes=5000, files=files))
    tokenize(other)  # another share: everything
    assert merge(other)["splits"]["held_out"]["documents"] > 1.5 * open_shards(job.output).manifest["splits"]["held_out"]["documents"]


@pytest.mark.parametrize("bucket", [1 << 22, 50])
def test_of_equal_documents_the_first_stays(make_job: MakeJob, tmp_path: Path, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_BUCKET_DOCUMENTS", bucket)
    lines = [f"this is line {number * number % 700}" for number in range(3000)]
    text = tmp_path / "a.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    every, once = make_job("every", piece_bytes=6000, files=[text]), make_job("once", piece_bytes=6000, files=[text], unique=True)
    manifests = []
    for job in (every, once):
        tokenize(job)
        manifests.append(merge(job))
    for split in SPLITS:
        repeated, unique = (texts_of(job.output, split, job.tokenizer) for job in (every, once))
        assert unique == list(dict.fromkeys(repeated)) and len(unique) < len(repeated) / 3
        assert manifests[1]["splits"][split]["documents"] == len(unique)
        assert manifests[1]["splits"][split]["tokens"] == sum(map(len, unique))
    counted = np.bincount(np.concatenate([shard.tokens for split in SPLITS for shard in open_shards(once.output).splits[split]]))
    assert open_shards(once.output).token_counts().sum(0)[: len(counted)].tolist() == counted.tolist()
    assert manifests[1]["report"]["duplicates"] == 3000 - len(set(lines)) and manifests[0]["report"]["duplicates"] == 0


def test_bad_input_keeps_what_is_done_and_names_the_place(make_job: MakeJob, tmp_path: Path) -> None:
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text('{"text": "one"}\n' * 1000, encoding="utf-8")
    bad.write_text('{"text": "one"}\n' * 100 + "{\n", encoding="utf-8")
    job = replace(make_job("shards"), pieces=pieces(find_files([str(good), str(bad)]), None, 8000), unit=None)
    with pytest.raises(UserError, match=r"b\.jsonl.* is not JSON"):
        tokenize(job, processes=1)
    assert len(list(job.work.glob("*.json"))) == 2 and not job.output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"part": 3, "parts": 3}, "--part 3 must be one of 0 to 2"), ({"part": -1}, "--part -1 must be one of 0 to 0")],
)
def test_parts_are_counted_from_0(make_job: MakeJob, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenize(make_job("shards"), **arguments)


def test_one_part_of_one_is_a_part(make_job: MakeJob, tmp_path: Path, corpus_file: Path) -> None:
    """As in an array that turned out to have a single task."""
    where = ["--input", corpus_file, "--tokenizer", make_job("x").tokenizer, "--output", tmp_path / "shards"]
    for arguments in (["--part", 0, "--parts", 1], ["--merge"]):
        assert not (tmp_path / "shards").exists()
        done = script("tokenize_corpus", *where, *arguments)
        assert done.returncode == 0, done.stderr
    assert open_shards(tmp_path / "shards").manifest["splits"]["train"]["documents"]


def test_counting_a_shard_takes_less_memory_than_the_shard() -> None:
    tokens = np.arange(SHARD_TOKENS).astype(np.uint16) % 1000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counts = tokenizing._counted(tokens, 1000)
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert counts.tolist() == np.bincount(tokens).tolist()
    assert most < tokens.nbytes / 4


def test_a_merge_forgets_what_another_one_left(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it left out documents, and then asked to keep them."""
    unique, every, whole = make_job("shards", unique=True), make_job("shards"), make_job("whole")
    tokenize(unique)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "publish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(unique)
    for job in (every, whole):
        tokenize(job)
        merge(job)
    assert content(every.output) == content(whole.output)
