"""Tests of the merge of pieces into shards, with deduplication and after interruptions."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kantai.data.shards import SHARD_TOKENS, SPLITS, open_shards
from kantai.errors import UserError
from kantai.preprocessing import merge as tokenizing
from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import merge
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.files import file_contents, split_documents

MakeJob = Callable[..., Job]
EOS = 2


def test_manifest_holds_unigram_entropy(shards_dir: Path) -> None:
    """The entropy is in nats per token, over all tokens but ``</s>``."""
    shards = open_shards(shards_dir)
    for split in SPLITS:
        tokens = np.concatenate([shard.tokens for shard in shards.splits[split]])
        shares = np.unique(tokens[tokens != EOS], return_counts=True)[1] / (tokens != EOS).sum()
        assert shards.manifest["splits"][split]["unigram_entropy"] == pytest.approx(
            sum(-p * math.log(p) for p in shares), abs=1e-9
        )


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        ("\n\n", 0.1, "no documents to train on: the input has no text"),
        ("one\n", 1 - 1e-9, "none of 1 documents was left to train on, as it is the only one"),
        ("one\n", 1e-9, "none of 1 documents was held out, as it is the only one"),
        ("one\n", 0.0, "must lie between 0 and 1"),
        ("one\n", 1.0, "must lie between 0 and 1"),
    ],
)
def test_input_without_two_splits_is_refused(
    tmp_path: Path, tokenizer_dir: Path, text: str, share: float, message: str
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    job = Job(
        pieces(find_files([str(tmp_path / "a.txt")]), "line"),
        "line",
        "text",
        tokenizer_dir,
        tmp_path / "shards",
        {},
        share,
    )
    with pytest.raises(UserError, match=message):
        tokenize(job, processes=1)
        merge(job)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_merge_needs_all_parts(make_job: MakeJob) -> None:
    job = make_job("shards")
    tokenize(job, part=1, parts=2, processes=1)
    with pytest.raises(
        UserError,
        match=(
            rf"{len(job.pieces[::2])} of {len(job.pieces)} pieces "
            r"are not tokenized yet \(0, 2, 4, "
        ),
    ):
        merge(job)
    assert not job.output.exists()
    tokenize(job, part=0, parts=2, processes=1)
    merge(job)
    assert job.output.exists()


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("step", ["write_shard", "publish", "manifest_entry"])
def test_interrupted_merge_is_redone(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, unique: bool, step: str
) -> None:
    whole = make_job("whole", unique=unique)
    broken = make_job("broken", unique=unique)
    for job in (whole, broken):
        tokenize(job, processes=1)
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
    assert file_contents(broken.output) == file_contents(whole.output)


@pytest.mark.parametrize("bucket", [1 << 22, 50])
def test_deduplication_keeps_first_document(
    make_job: MakeJob, tmp_path: Path, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_BUCKET_DOCUMENTS", bucket)
    lines = [f"this is line {number * number % 700}" for number in range(3000)]
    text = tmp_path / "a.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    every = make_job("every", piece_bytes=6000, files=[text])
    once = make_job("once", piece_bytes=6000, files=[text], unique=True)
    manifests = []
    for job in (every, once):
        tokenize(job, processes=1)
        manifests.append(merge(job))
    for split in SPLITS:
        repeated, unique = (split_documents(job.output, split) for job in (every, once))
        assert unique == list(dict.fromkeys(repeated)) and len(unique) < len(repeated) / 3
        assert manifests[1]["splits"][split]["documents"] == len(unique)
        assert manifests[1]["splits"][split]["tokens"] == sum(map(len, unique))
    counted = np.bincount(
        np.concatenate(
            [shard.tokens for split in SPLITS for shard in open_shards(once.output).splits[split]]
        )
    )
    assert (
        open_shards(once.output).token_counts().sum(0)[: len(counted)].tolist() == counted.tolist()
    )
    assert manifests[1]["report"]["duplicates"] == 3000 - len(set(lines))
    assert manifests[0]["report"]["duplicates"] == 0


def test_token_count_takes_less_memory_than_shard() -> None:
    tokens = np.arange(SHARD_TOKENS).astype(np.uint16) % 1000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counts = tokenizing.count_tokens(tokens, 1000)
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert counts.tolist() == np.bincount(tokens).tolist()
    assert most < tokens.nbytes / 4


def test_merge_ignores_leftovers_of_other_merge(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge with deduplication breaks off; the next merge keeps duplicates."""
    unique = make_job("shards", unique=True)
    every = make_job("shards")
    whole = make_job("whole")
    tokenize(unique, processes=1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "publish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(unique)
    for job in (every, whole):
        tokenize(job, processes=1)
        merge(job)
    assert file_contents(every.output) == file_contents(whole.output)
