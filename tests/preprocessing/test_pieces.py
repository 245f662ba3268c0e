"""Pieces of any size and number become shards of which every token is shown."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kantai.data.packing import Contiguous
from kantai.data.shards import MIN_SHARD_TOKENS, open_shards
from kantai.errors import UserError
from kantai.preprocessing import tokenize as tokenizing
from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import _joined, describe, merge
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.commands import script
from tests.helpers.files import file_contents, split_documents

MakeJob = Callable[..., Job]


def tokens_shown(folder: Path, seq_len: int) -> tuple[int, int]:
    """Tokens of the training split, and tokens that its rows hold in an epoch."""
    split = open_shards(folder).splits["train"]
    sequences = Contiguous(split, seq_len, 0, 1)
    return int(split.tokens.sum()), int(sequences.samples_per_shard.sum()) * (seq_len - 1)


def test_many_small_files_of_the_hub_are_shown_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(41):
        lines = 1200 if number == 40 else 25
        texts = [f"line {line} of the file {number}, and some words" for line in range(lines)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number:03d}.parquet")
    output = tmp_path / "shards"
    where = ["--input", f"hub:{folder}", "--tokenizer", tokenizer_dir, "--output", output]
    done = script("tokenize_corpus", *where, "--held_out", "0.1")
    assert done.returncode == 0, done.stderr
    assert len(open_shards(output).splits["train"]) == 1
    for seq_len in (128, 512):
        tokens, shown = tokens_shown(output, seq_len)
        assert tokens <= shown < tokens + seq_len


def test_small_shards_are_joined_and_large_ones_are_moved(make_job: MakeJob) -> None:
    apart = make_job("apart")
    tokenize(apart, processes=1)
    merge(apart, 0)
    job = make_job("joined")
    tokenize(job, processes=1)
    sizes = [shard["tokens"] for shard in job.read_record(0)["train"]]  # type: ignore[index]
    before = {path.name: path.stat().st_ino for path in job.work.glob("train-*")}
    merge(job, sizes[0])
    assert sorted(split_documents(job.output, "train")) == sorted(
        split_documents(apart.output, "train")
    )
    shards = open_shards(job.output).splits["train"]
    assert 3 < len(shards) < len(before)
    assert min(shards.tokens) >= sizes[0]
    moved = [(job.output / file).stat().st_ino == before[file] for file in shards.files]
    assert any(moved) and not all(moved)


def test_shards_of_two_merges_are_equal_when_the_first_was_killed(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kantai.preprocessing import merge as merging

    whole = make_job("whole")
    broken = make_job("broken")
    for job in (whole, broken):
        tokenize(job, processes=1)
    limit = whole.read_record(0)["train"][0]["tokens"]  # type: ignore[index]
    merge(whole, limit)
    write = merging.write_shard
    written: list[Path] = []

    def fail(path: Path, *arguments: object) -> object:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(path, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            merge(broken, limit)
    merge(broken, limit)
    assert file_contents(broken.output) == file_contents(whole.output)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([0, 0], []),
        ([3], [[0]]),
        ([10, 12], [[0], [1]]),
        ([3, 10, 3, 11, 4], [[1], [3], [0, 2, 4]]),
        ([3, 0, 3, 4, 2], [[0, 2, 3, 4]]),
        ([20, 2], [[0, 1]]),
        ([2, 20], [[1, 0]]),
    ],
)
def test_shards_are_joined_by_their_sizes_alone(sizes: list[int], groups: list[list[int]]) -> None:
    assert _joined(sizes, 10) == groups


def test_shards_of_an_ordinary_corpus_stay_apart(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    large = tmp_path / "large.txt"
    text = corpus_file.read_text(encoding="utf-8")
    large.write_text(text * (9 * 2**20 // len(text)), encoding="utf-8")
    cut = pieces(find_files([str(large)]), "paragraph")
    job = Job(cut, "paragraph", "text", tokenizer_dir, tmp_path / "shards", {})
    tokenize(job, processes=2)
    records = [job.read_record(number) for number in range(len(cut))]
    merge(job)
    shards = open_shards(job.output).splits["train"]
    assert len(cut) == 3 and len(shards) == 2  # the third piece has a quarter of the others' text
    assert records[0]["train"][0]["tokens"] == shards.tokens[0]  # type: ignore[index]
    assert min(shards.tokens) > MIN_SHARD_TOKENS


def test_equal_documents_are_left_out_of_joined_shards(make_job: MakeJob, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    lines = [f"this is line {number * number % 700}" for number in range(3000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    every = make_job("every", piece_bytes=6000, files=[text])
    once = make_job("once", piece_bytes=6000, files=[text], unique=True)
    for job in (every, once):
        tokenize(job, processes=1)
        merge(job)
    kept = split_documents(once.output, "train")
    assert kept == list(dict.fromkeys(split_documents(every.output, "train")))
    counts = open_shards(once.output).token_counts()[0]
    assert counts.sum() == sum(map(len, kept))


@pytest.mark.parametrize("kind", ["train", "held_out", "arrays"])
def test_bit_flipped_in_a_piece_is_found_by_the_merge(make_job: MakeJob, kind: str) -> None:
    job = make_job("shards")
    tokenize(job, processes=1)
    path = job.arrays_path(2)
    if kind != "arrays":
        path = job.work / job.read_record(2)[kind][0]["file"]  # type: ignore[index]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"1 of \d+ pieces were damaged .*{path.name} the first"):
        merge(job)
    assert not job.output.exists()
    tokenize(job, processes=1)
    whole = make_job("whole")
    tokenize(whole, processes=1)
    merge(job)
    merge(whole)
    assert file_contents(job.output) == file_contents(whole.output)


def test_bit_flipped_in_a_record_has_the_piece_made_again(make_job: MakeJob) -> None:
    job = make_job("shards")
    tokenize(job, processes=1)
    path = job.record_path(1)
    path.write_text(path.read_text().replace('"empty": ', '"empty": 1'))
    with pytest.raises(UserError, match=r"1 of \d+ pieces are not tokenized yet \(1\)"):
        merge(job)


def test_input_that_changes_while_it_is_read_is_refused(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text("".join(f"line {line}\n" for line in range(500)), encoding="utf-8")
    job = make_job("shards", piece_bytes=3000, files=files)
    read = tokenizing.documents

    def read_and_change(*arguments: object) -> object:
        yield from read(*arguments)  # type: ignore[arg-type]
        files[1].write_text("".join(f"LINE {line}\n" for line in range(500)), encoding="utf-8")
        os.utime(files[1], (1, 1))

    monkeypatch.setattr(tokenizing, "documents", read_and_change)
    with pytest.raises(UserError, match=r"b\.txt has changed since this start looked at it"):
        tokenize(job, processes=1)
    done = [number for number in range(len(job.pieces)) if job.read_record(number)]
    assert done  # those of the first file, which did not change
    assert all(span.file.path.endswith("a.txt") for number in done for span in job.pieces[number])


def test_input_that_is_gone_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    job = make_job("shards", files=[file])
    file.write_text("one\ntwo\nthree\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt has changed since this start looked at it"):
        tokenize(job, processes=1)
    assert not job.work.parent.exists()


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        ("one\n" * 500, 0.5, "as all have the same text: bring more text, cut smaller"),
        ("one\ntwo\nthree\n", 1e-9, r"none of 3 documents was held out: raise --held_out above 0"),
        ("one\ntwo\n", 1 - 1e-9, "none of 2 documents was left to train on: lower --held_out"),
    ],
)
def test_message_says_why_a_split_is_empty(
    make_job: MakeJob, tmp_path: Path, text: str, share: float, message: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    job = replace(make_job("shards", files=[file]), held_out_share=share)
    tokenize(job, processes=1)
    with pytest.raises(UserError, match=message):
        merge(job)


def test_share_that_the_message_names_gives_two_splits(make_job: MakeJob, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\nthree\n", encoding="utf-8")
    job = replace(make_job("shards", files=[file]), held_out_share=1e-9)
    tokenize(job, processes=1)
    with pytest.raises(UserError) as raised:
        merge(job)
    share = float(str(raised.value).partition("above ")[2].partition(",")[0])
    job = replace(job, held_out_share=share + 0.01)
    tokenize(job, processes=1)
    assert merge(job)["splits"]["held_out"]["documents"] == 1


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A file of one's own: two of its lines are in the training text, one of them twice."""
    path = tmp_path / "validation.txt"
    own = [f"this validates, line {number}" for number in range(50)]
    path.write_text("\n".join([*own, "line 7 of training", "line 9 of training"]), encoding="utf-8")
    training = [f"line {number} of training" for number in range(300)]
    text = "\n".join([*training, "line 7 of training"])
    (tmp_path / "training.txt").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("unique", [False, True])
def test_validation_files_are_the_held_out_split(
    make_job: MakeJob, tmp_path: Path, validation: Path, unique: bool
) -> None:
    cut = pieces(find_files([str(validation)]), "line", 300)
    job = make_job("shards", files=[tmp_path / "training.txt"], piece_bytes=1000, unique=unique)
    job = replace(job, held_out_pieces=cut)
    tokenize(job, processes=1)
    manifest = merge(job)
    held_out = split_documents(job.output, "held_out")
    lines = validation.read_text().split("\n")
    texts = [job.vocabulary.tokenizer.decode(tokens[:-1]) for tokens in held_out]
    assert texts == lines
    assert manifest["splits"]["train"]["documents"] == 301 - unique
    assert manifest["report"]["held_out_in_train"] == {
        "documents": 2,
        "first": ["'line 7 of training'", "'line 9 of training'"],
    }
    said = "2 of 52 documents of --held_out_input are in the training text too and stay in both"
    assert any(line.startswith(f"{said}: 'line 7") for line in describe(manifest))


def test_program_takes_validation_files(
    tmp_path: Path, validation: Path, tokenizer_dir: Path
) -> None:
    training = tmp_path / "training.txt"
    where = ["--tokenizer", tokenizer_dir, "--output", tmp_path / "shards", "--input", training]
    for arguments, message in [
        (["--held_out_input", validation, "--held_out", 0.1], "give either --held_out or"),
        (["--held_out_input", training], "training.txt is in both --input and --held_out_input"),
        (["--held_out_input", tmp_path / "nothing"], "no input at"),
    ]:
        done = script("tokenize_corpus", *where, *arguments)
        assert done.returncode == 2 and message in done.stderr
        assert not (tmp_path / "shards").exists()
    done = script("tokenize_corpus", *where, "--held_out_input", validation)
    assert done.returncode == 0, done.stderr
    assert "2 of 52 documents of --held_out_input are in the training text too" in done.stdout
    manifest = open_shards(tmp_path / "shards").manifest
    assert manifest["splits"]["held_out"]["documents"] == 52
    assert manifest["source"]["held_out_input"] == [str(validation)]


def test_blank_validation_file_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    job = replace(make_job("shards"), held_out_pieces=pieces(find_files([str(blank)]), "line"))
    tokenize(job, processes=1)
    with pytest.raises(UserError, match="--held_out_input has no text: name other files"):
        merge(job)
    assert not job.work.parent.exists()


def test_data_set_that_changes_while_it_is_read_is_refused(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        texts = [f"line {line} of the file {number}" for line in range(100)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet")
    job = replace(make_job("shards"), unit=None, pieces=pieces(find_files([f"hub:{folder}"])))
    read = tokenizing.documents

    def read_and_change(*arguments: object) -> object:
        pq.write_table(pa.table({"text": ["another text"]}), folder / "2.parquet")
        yield from read(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "documents", read_and_change)
        with pytest.raises(UserError, match="data has changed since this start looked at it"):
            tokenize(job, processes=1)
    again = replace(job, pieces=pieces(find_files([f"hub:{folder}"])))
    assert not any(again.read_record(number) for number in range(3))
