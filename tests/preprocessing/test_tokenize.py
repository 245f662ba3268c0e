"""Tests that a corpus gives the same bytes of shards for every division of the work."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from kantai.data.shards import open_shards
from kantai.errors import UserError
from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import merge
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.commands import script
from tests.helpers.files import file_contents, split_documents
from tests.helpers.tokenizer_kinds import changed, loaded

MakeJob = Callable[..., Job]
TEXTS = [f"document {number} {'x' * (number % 40)}" for number in range(400)]


def test_split_of_text_depends_on_text_alone(tmp_path: Path, tokenizer_dir: Path) -> None:
    def held_out(name: str, texts: list[str], share: float = 0.25) -> set[tuple[int, ...]]:
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
        cut = pieces(find_files([str(tmp_path / f"{name}.txt")]), "line", 3000)
        job = Job(cut, "line", "text", tokenizer_dir, tmp_path / name, {}, share)
        tokenize(job, processes=1)
        merge(job)
        return set(split_documents(job.output, "held_out"))

    every = held_out("all", TEXTS)
    assert held_out("backwards", TEXTS[::-1]) == every
    assert held_out("doubled", TEXTS + TEXTS) == every
    assert held_out("half", TEXTS[::2]) < every
    assert held_out("more", TEXTS, share=0.5) > every
    assert 60 < len(every) < 140  # 100 of 400 expected, within 4.6 standard errors


def test_existing_output_is_refused_and_unchanged(
    tmp_path: Path, shards_dir: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    shutil.copytree(shards_dir, tmp_path / "shards")
    cut = pieces(find_files([str(corpus_file)]), "line")
    with pytest.raises(UserError, match=r"shards exists already"):
        tokenize(Job(cut, "line", "text", tokenizer_dir, tmp_path / "shards", {}))
    for path in shards_dir.iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ours", [True, False])
def test_pieces_are_removed_only_from_kantai_shards(
    tmp_path: Path, shards_dir: Path, corpus_file: Path, tokenizer_dir: Path, ours: bool
) -> None:
    shutil.copytree(shards_dir if ours else tokenizer_dir, tmp_path / "output")
    (tmp_path / "output" / "pieces").mkdir()
    (tmp_path / "output" / "pieces" / "thesis.tex").write_text("years of work")
    job = Job(
        pieces(find_files([str(corpus_file)]), "line"),
        "line",
        "text",
        tokenizer_dir,
        tmp_path / "output",
        {},
    )
    with pytest.raises(UserError, match="output exists already"):
        tokenize(job)
    assert (tmp_path / "output" / "pieces").exists() != ours


@pytest.mark.parametrize("unique", [False, True])
def test_processes_and_parts_give_the_same_bytes(make_job: MakeJob, unique: bool) -> None:
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

    assert (
        file_contents(alone.output)
        == file_contents(together.output)
        == file_contents(in_parts.output)
    )
    assert {path.name for path in alone.output.parent.iterdir()} == {
        "alone",
        "together",
        "in_parts",
    }


def test_only_changed_pieces_are_tokenized_again(make_job: MakeJob, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for number, file in enumerate(files):
        file.write_text(
            "".join(f"line {line} of file {number}\n" for line in range(500)), encoding="utf-8"
        )
    tokenize(make_job("shards", piece_bytes=5000, files=files), processes=1)
    work = make_job("shards", piece_bytes=5000, files=files).work
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.json")}
    files[2].write_text(
        files[2].read_text(encoding="utf-8").replace("line", "LINE"), encoding="utf-8"
    )
    os.utime(files[2], (1, 1))

    job = make_job("shards", piece_bytes=5000, files=files)
    tokenize(job, processes=1)
    redone = {
        name for name, modified in before.items() if (work / name).stat().st_mtime_ns != modified
    }
    assert redone == {
        f"{number:06d}.json"
        for number, piece in enumerate(job.pieces)
        if any(span.file.path.endswith("2.txt") for span in piece)
    }
    assert 0 < len(redone) < len(before)
    assert merge(job)["report"]["documents"] == 2000

    other = replace(make_job("other", piece_bytes=5000, files=files), held_out_share=0.2)
    tokenize(make_job("other", piece_bytes=5000, files=files), processes=1)
    tokenize(other, processes=1)  # another held-out share redoes all pieces
    assert (
        merge(other)["splits"]["held_out"]["documents"]
        > 1.5 * open_shards(job.output).manifest["splits"]["held_out"]["documents"]
    )


def test_bad_input_keeps_finished_pieces(make_job: MakeJob, tmp_path: Path) -> None:
    good = tmp_path / "a.jsonl"
    bad = tmp_path / "b.jsonl"
    good.write_text('{"text": "one"}\n' * 1000, encoding="utf-8")
    bad.write_text('{"text": "one"}\n' * 100 + "{\n", encoding="utf-8")
    job = replace(
        make_job("shards"), pieces=pieces(find_files([str(good), str(bad)]), None, 8000), unit=None
    )
    with pytest.raises(UserError, match=r"b\.jsonl.* is not JSON"):
        tokenize(job, processes=1)
    assert len(list(job.work.glob("*.json"))) == 2 and not job.output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": 3, "parts": 3}, "--part 3 must be one of 0 to 2"),
        ({"part": -1}, "--part -1 must be one of 0 to 0"),
    ],
)
def test_part_out_of_range_is_refused(
    make_job: MakeJob, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tokenize(make_job("shards"), **arguments)


def test_single_part_still_needs_merge(
    make_job: MakeJob, tmp_path: Path, corpus_file: Path
) -> None:
    """A job array may have a single task."""
    where = [
        "--input",
        corpus_file,
        "--tokenizer",
        make_job("x").tokenizer,
        "--output",
        tmp_path / "shards",
    ]
    for arguments in (["--part", 0, "--parts", 1], ["--merge"]):
        assert not (tmp_path / "shards").exists()
        done = script("tokenize_corpus", *where, *arguments)
        assert done.returncode == 0, done.stderr
    assert open_shards(tmp_path / "shards").manifest["splits"]["train"]["documents"]


def test_worker_processes_report_missing_tokenizer(make_job: MakeJob, tmp_path: Path) -> None:
    job = replace(make_job("shards"), tokenizer=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no tokenizer at .*nothing"):
        tokenize(job, processes=2)


def test_parts_of_different_normalizers_are_not_merged(
    make_job: MakeJob, tmp_path: Path, tokenizer_dir: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    loaded(tokenizer, tmp_path / "lowercase")
    job = make_job("mixed")
    tokenize(job, part=0, parts=2, processes=1)
    lowercase = replace(job, tokenizer=tmp_path / "lowercase")
    tokenize(lowercase, part=1, parts=2, processes=1)
    for either in (job, lowercase):
        with pytest.raises(UserError, match="pieces are not tokenized yet"):
            merge(either)


def test_ids_beyond_two_bytes_are_stored_in_four(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))

    def move_end(tree: dict[str, Any]) -> None:
        tree["model"]["vocab"]["</s>"] = 70_000
        for entry in tree["added_tokens"]:
            entry["id"] = tree["model"]["vocab"][entry["content"]]

    loaded(changed(tokenizer, move_end), tmp_path / "holes")
    cut = pieces(find_files([str(corpus_file)]), "paragraph")
    job = Job(cut, "paragraph", "text", tmp_path / "holes", tmp_path / "shards", {}, 0.05)
    tokenize(job, processes=1)
    merge(job)
    shards = open_shards(job.output)
    assert shards.manifest["dtype"] == "uint32"
    assert shards.manifest["vocab_size"] == shards.token_counts().shape[1] == 70_001
    last_tokens = shards.splits["train"][0].tokens[shards.splits["train"][0].boundaries[1:] - 1]
    assert set(last_tokens.tolist()) == {70_000}
