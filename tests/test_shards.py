"""Shards hold exactly the documents' tokens, whole or not at all, and anything else is told from them."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kantai import UserError
from kantai.corpus import documents
from kantai.shards import SPLITS, Shard, open_shards, write_shards
from kantai.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
EOS = 2
TEXTS = [f"document {number} {'x' * (number % 40)}" for number in range(400)]


def encode(texts: list[str]) -> list[list[int]]:
    """A tokenizer of bytes, so that ids can be written down by hand."""
    return [[*text.encode()] for text in texts]


def write(folder: Path, texts: Any, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "encode": encode,
        "vocab_size": 256,
        "eos_id": EOS,
        "fingerprint": "f",
        "source": {"files": ["a.txt"]},
        "held_out_share": 0.25,
    }
    return write_shards(texts, folder, **settings | changes)


def texts_of(shards: tuple[Shard, ...]) -> list[str]:
    """The documents of a split, read back through the boundaries; each must end with ``</s>``."""
    texts = []
    for shard in shards:
        assert shard.boundaries[0] == 0 and shard.boundaries[-1] == len(shard.tokens)
        for start, stop in zip(shard.boundaries, shard.boundaries[1:], strict=False):
            *ids, last = shard.tokens[start:stop].tolist()
            assert last == EOS
            texts.append(bytes(ids).decode())
    return texts


@pytest.mark.parametrize("shard_tokens", [1, 100, 1000, 1 << 26])
def test_documents_come_back_in_order(tmp_path: Path, shard_tokens: int) -> None:
    manifest = write(tmp_path / "shards", iter(TEXTS), shard_tokens=shard_tokens)
    opened = open_shards(tmp_path / "shards")
    found = {name: texts_of(opened.splits[name]) for name in SPLITS}
    assert sorted(found["train"] + found["held_out"]) == sorted(TEXTS)
    for name in SPLITS:
        assert found[name] == [text for text in TEXTS if text in found[name]]
        assert manifest["splits"][name]["documents"] == len(found[name])
        assert manifest["splits"][name]["tokens"] == sum(len(text) + 1 for text in found[name])
        assert all(len(shard.tokens) <= shard_tokens or len(shard.boundaries) == 2 for shard in opened.splits[name])
        for shard, following in itertools.pairwise(opened.splits[name]):  # closed only because the next document did not fit
            assert len(shard.tokens) + following.boundaries[1] > shard_tokens
    assert opened.manifest == manifest | {"files": opened.manifest["files"]}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_a_token_takes_two_bytes_where_they_hold_it(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    largest = vocab_size - 1
    write(tmp_path / "shards", TEXTS, vocab_size=vocab_size, encode=lambda texts: [[largest] for _ in texts])
    shard = open_shards(tmp_path / "shards").splits["train"][0]
    assert shard.tokens.dtype == dtype
    assert shard.tokens[:4].tolist() == [largest, EOS, largest, EOS]


def test_the_real_tokenizers_ids_are_kept(shards_dir: Path, tokenizer_dir: Path, corpus_file: Path) -> None:
    vocabulary, opened = load_tokenizer(tokenizer_dir), open_shards(shards_dir)
    texts = list(documents([corpus_file], "paragraph"))
    expected = {(*ids, vocabulary.eos_id) for ids in vocabulary.encode(texts)}
    found = [
        tuple(shard.tokens[start:stop].tolist())
        for split in opened.splits.values()
        for shard in split
        for start, stop in zip(shard.boundaries, shard.boundaries[1:], strict=False)
    ]
    assert set(found) == expected and len(found) == len(texts)
    assert 0.03 < opened.manifest["splits"]["held_out"]["documents"] / len(texts) < 0.07


def test_datasets_reads_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "shards", TEXTS, shard_tokens=1000)
    files = sorted(str(path) for path in (tmp_path / "shards").glob("train-*.arrow"))
    rows = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert [bytes(row[:-1]).decode() for row in rows["input_ids"]] == texts_of(open_shards(tmp_path / "shards").splits["train"])


def test_opening_copies_nothing(tmp_path: Path) -> None:
    write(tmp_path / "shards", ["x" * 10_000 + str(number) for number in range(100)])
    before = pa.total_allocated_bytes()
    shard = open_shards(tmp_path / "shards").splits["train"][0]
    assert shard.tokens.nbytes > 1_000_000
    assert pa.total_allocated_bytes() - before < 10_000
    for array in (shard.tokens, shard.boundaries):
        assert not array.flags.owndata and not array.flags.writeable


def test_a_text_lands_in_the_same_split_whatever_else_there_is(tmp_path: Path) -> None:
    def held_out(name: str, texts: list[str], share: float = 0.25) -> set[str]:
        write(tmp_path / name, texts, held_out_share=share)
        return set(texts_of(open_shards(tmp_path / name).splits["held_out"]))

    every = held_out("all", TEXTS)
    assert held_out("backwards", TEXTS[::-1]) == every
    assert held_out("half", TEXTS[::2]) == every & set(TEXTS[::2])
    assert held_out("doubled", TEXTS + TEXTS) == every
    assert held_out("more", TEXTS, share=0.5) > every
    assert 60 < len(every) < 140  # a quarter of 400, within 4.6 standard errors


def test_unigram_entropy(tmp_path: Path) -> None:
    """Every order of the letters of "aabc": half a, a quarter b and c each, so 1.5 bits in either split, ``</s>`` left out."""
    texts = ["aabc", "aacb", "abac", "acab", "abca", "acba", "baac", "caab", "baca", "caba", "bcaa", "cbaa"]
    manifest = write(tmp_path / "shards", texts, held_out_share=0.5, shard_tokens=10)
    for name in SPLITS:
        assert manifest["splits"][name]["unigram_entropy"] == pytest.approx(1.5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "no documents to train on: the input has no text"),
        (TEXTS[:1], {"held_out_share": 1 - 1e-9}, "no documents to train on: lower --held_out"),
        (TEXTS[:1], {"held_out_share": 1e-9}, "none of 1 documents was held out"),
        (TEXTS, {"held_out_share": 0.0}, "must lie between 0 and 1"),
        (TEXTS, {"held_out_share": 1.0}, "must lie between 0 and 1"),
    ],
)
def test_what_gives_no_two_splits_is_refused_and_leaves_nothing(
    tmp_path: Path, texts: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "shards", texts, **changes)
    assert not list(tmp_path.iterdir())


def test_output_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "shards", TEXTS)
    before = (tmp_path / "shards" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"shards exists already"):
        write(tmp_path / "shards", TEXTS[:100])
    assert (tmp_path / "shards" / "manifest.json").read_bytes() == before


def test_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        for number in range(5000):
            yield f"document {number}"
        raise UserError("the input broke off")

    with pytest.raises(UserError, match="broke off"):
        write(tmp_path / "shards", broken(), shard_tokens=100)
    assert not list(tmp_path.iterdir())


def test_sigkill_in_the_middle_leaves_no_shards_and_the_next_run_works(tmp_path: Path) -> None:
    code = f"""
import os, signal, pathlib
from kantai.shards import write_shards
def texts():
    for number in range(5000):
        yield f"document {{number}}"
    os.kill(os.getpid(), signal.SIGKILL)
write_shards(texts(), pathlib.Path({str(tmp_path / "shards")!r}), encode=lambda texts: [[*text.encode()] for text in texts],
             vocab_size=256, eos_id=2, fingerprint="f", source={{}}, shard_tokens=100)
"""
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert ran.returncode == -signal.SIGKILL
    leftover = tmp_path / ".shards.partial"
    assert list(leftover.glob("*.arrow"))  # the kill came while shards were being written
    assert list(tmp_path.iterdir()) == [leftover]

    write(tmp_path / "shards", TEXTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "shards"]
    assert sorted(text for split in open_shards(tmp_path / "shards").splits.values() for text in texts_of(split)) == sorted(TEXTS)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["train-00000.arrow", "held_out-00000.arrow"])
def test_damaged_shard_is_named(tmp_path: Path, shards_dir: Path, damage: Any, name: str) -> None:
    shutil.copytree(shards_dir, tmp_path / "shards")
    damage(tmp_path / "shards" / name)
    with pytest.raises(UserError, match=f"damaged shards: .*{name}"):
        open_shards(tmp_path / "shards")
    if damage is not flip_a_bit:  # sizes are compared in any case
        with pytest.raises(UserError, match=f"damaged shards: .*{name}"):
            open_shards(tmp_path / "shards", hashes=False)


def test_folder_that_holds_no_shards_is_named(tmp_path: Path, shards_dir: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="no shards at"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"manifest\.json is missing or unreadable"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="is not a folder of shards"):
        open_shards(tokenizer_dir)
    shutil.copytree(shards_dir, tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"dtype": "uint32"}))
    with pytest.raises(UserError, match="is not a folder of shards"):
        open_shards(tmp_path / "other")
