"""Shards hold exactly the documents' tokens. Damaged and foreign folders are refused."""

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kantai.data.shards import SHARD_TOKENS, Shard, ShardWriter, map_shard, open_shards, token_dtype
from kantai.data.tokenizer import load_tokenizer
from kantai.errors import UserError
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import find_files
from kantai.storage.atomic import digest
from tests.helpers.files import documents_of

EOS = 2
TEXTS = [f"document {number} {'x' * (number % 40)}" for number in range(400)]


def write_shards(
    folder: Path, texts: list[str], shard_tokens: int = SHARD_TOKENS
) -> list[dict[str, Any]]:
    """Write the bytes of each text as one document."""
    folder.mkdir()
    writer = ShardWriter(folder / "train", np.dtype(np.uint16), shard_tokens)
    for text in texts:
        ids = np.array([*text.encode(), EOS])
        writer.append(ids, np.array([len(ids)]))
    return writer.finish()


def open_shard(path: Path) -> Shard:
    with path.open("rb") as file:
        return map_shard(file)


@pytest.mark.parametrize("shard_tokens", [1, 100, 1000, 1 << 26])
def test_shards_return_documents_in_order(tmp_path: Path, shard_tokens: int) -> None:
    entries = write_shards(tmp_path / "shards", TEXTS, shard_tokens=shard_tokens)
    shards = [open_shard(tmp_path / "shards" / entry["file"]) for entry in entries]
    assert [
        bytes(document[:-1]).decode() for shard in shards for document in documents_of(shard)
    ] == TEXTS
    for entry, shard in zip(entries, shards, strict=True):
        assert (entry["documents"], entry["tokens"]) == (len(shard.lengths), len(shard.tokens))
        assert len(shard.tokens) <= shard_tokens or len(shard.lengths) == 1
    # A shard closes only when the next document does not fit.
    for shard, following in itertools.pairwise(shards):
        assert len(shard.tokens) + following.lengths[0] > shard_tokens
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        entry["file"] for entry in entries
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_width_follows_vocabulary_size(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    writer = ShardWriter(tmp_path / "train", token_dtype(vocab_size))
    writer.append(np.array([vocab_size - 1, EOS] * 1000), np.full(1000, 2))
    (entry,) = writer.finish()
    shard = open_shard(tmp_path / entry["file"])
    assert shard.tokens.dtype == dtype and shard.tokens[:4].tolist() == [vocab_size - 1, EOS] * 2


def test_shards_keep_tokenizer_ids(
    shards_dir: Path, tokenizer_dir: Path, corpus_file: Path
) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    shards = open_shards(shards_dir)
    texts = [
        text
        for piece in pieces(find_files([str(corpus_file)]), "paragraph")
        for text in documents(piece, "paragraph")
    ]
    ids, lengths = vocabulary.encode(texts)
    expected = sorted(
        (*part.tolist(), vocabulary.eos_id) for part in np.split(ids, np.cumsum(lengths)[:-1])
    )
    assert (
        sorted(
            document
            for split in shards.splits.values()
            for shard in split
            for document in documents_of(shard)
        )
        == expected
    )
    assert 0.03 < shards.manifest["splits"]["held_out"]["documents"] / len(texts) < 0.07
    counted = np.bincount(
        np.concatenate([shard.tokens for shard in shards.splits["train"]]),
        minlength=vocabulary.size,
    )
    assert shards.token_counts()[0].tolist() == counted.tolist()


def test_datasets_library_reads_equal_rows(tmp_path: Path, many_shards_dir: Path) -> None:
    train = open_shards(many_shards_dir).splits["train"]
    files = [str(many_shards_dir / name) for name in train.files]
    rows = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [tuple(row) for row in rows["input_ids"]] == [
        document for shard in train for document in documents_of(shard)
    ]


def test_opening_shard_copies_nothing(tmp_path: Path) -> None:
    (entry,) = write_shards(
        tmp_path / "shards", ["x" * 10_000 + str(number) for number in range(100)]
    )
    before = pa.total_allocated_bytes()
    shard = open_shard(tmp_path / "shards" / entry["file"])
    assert shard.tokens.nbytes > 1_000_000
    assert pa.total_allocated_bytes() - before < 10_000
    for array in (shard.tokens, shard.boundaries):
        assert not array.flags.owndata and not array.flags.writeable


def test_split_closes_least_recently_used_shards(many_shards_dir: Path) -> None:
    train = open_shards(many_shards_dir).splits["train"]
    train.open_at_once = 3
    mapped = [weakref.ref(train[number].tokens) for number in (0, 1, 2, 0, 3)]
    assert [reference() is not None for reference in mapped] == [True, False, True, True, True]
    assert len(train) > 10 and train.tokens.tolist() == [len(shard.tokens) for shard in train]
    assert train.documents.tolist() == [len(shard.lengths) for shard in train]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["train-000000-000.arrow", "held_out-000.arrow"])
def test_damaged_shard_is_named(tmp_path: Path, shards_dir: Path, damage: Any, name: str) -> None:
    shutil.copytree(shards_dir, tmp_path / "shards")
    damage(tmp_path / "shards" / name)
    with pytest.raises(UserError, match=f"damaged shards: .*{name}"):
        open_shards(tmp_path / "shards")
    if damage is not flip_a_bit:  # without hashes, sizes are compared
        with pytest.raises(UserError, match=f"damaged shards: .*{name}"):
            open_shards(tmp_path / "shards", hashes=False)


def test_folder_without_valid_shards_is_named(
    tmp_path: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(UserError, match="no shards at"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"manifest\.json is missing or unreadable"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="is not a folder of shards"):
        open_shards(tokenizer_dir)

    shutil.copytree(shards_dir, tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    del manifest["digest"]
    rewrite(tmp_path / "other", manifest | {"dtype": "uint32"})
    with pytest.raises(
        UserError, match=r"damaged shards: train-000000-000\.arrow holds uint16, not uint32"
    ):
        open_shards(tmp_path / "other").splits["train"][0]

    manifest["splits"]["train"]["shards"][0]["tokens"] += 1
    rewrite(tmp_path / "other", manifest)
    with pytest.raises(
        UserError, match=r"damaged shards: train-000000-000\.arrow is not as its manifest says"
    ):
        open_shards(tmp_path / "other").splits["train"][0]


def rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": digest(manifest)}))
