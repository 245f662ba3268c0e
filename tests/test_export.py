"""An export holds what it must, for transformers of today and of years ago, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer

from kantai.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer
from kantai.errors import UserError
from kantai.export import _for_older_readers, export
from kantai.storage.atomic import staged
from tests.conftest import make_shards
from tests.helpers.saved_run import make_saved_run, model_at

FILES = {
    *("README.md", "config.json", "manifest.json", "merges.txt", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
}

Export = Callable[[Path], Path]


@pytest.fixture
def export_with(tmp_path: Path, shards_dir: Path) -> Export:
    """Return a function that exports a run with the tokenizer of a folder."""

    def export_run(tokenizer: Path) -> Path:
        run_dir = make_saved_run(tmp_path / "run", shards_dir, tokenizer, {})
        export(run_dir, model_at(run_dir, 3), 3, tmp_path / "model")
        return tmp_path / "model"

    return export_run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def merges(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "tokenizer.json").read_bytes())["model"]["merges"]
    return found


def test_export_has_what_older_readers_need(export_with: Export, tokenizer_dir: Path) -> None:
    """transformers 4.30 to 4.44 read merges as strings, 4.43 to 4.50 the bias by another name."""
    model = export_with(tokenizer_dir)
    assert all(isinstance(merge, str) for merge in merges(model))
    assert [merge.split() for merge in merges(model)] == merges(tokenizer_dir)
    weights = load_file(model / "model.safetensors")
    assert torch.equal(weights["lm_head.decoder.bias"], torch.full((1024,), 3.0))
    assert torch.equal(weights["lm_head.bias"], torch.full((1024,), 3.0))
    loaded = AutoModelForMaskedLM.from_pretrained(model)
    assert loaded.lm_head.decoder.bias is loaded.lm_head.bias
    assert Tokenizer.from_file(str(model / "tokenizer.json")).to_str() == (
        load_tokenizer(tokenizer_dir).tokenizer.to_str()
    )
    for name in ("vocab.json", "merges.txt"):
        assert (model / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_token_with_space_keeps_pairs_in_export(
    corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A merge of a token with a space in it cannot be written as a string."""
    spaced = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tree = json.loads(spaced.to_str())
    size = len(tree["model"]["vocab"])
    tree["model"]["vocab"] |= {" ": size, "a b": size + 1, "a ": size + 2}
    tree["model"]["merges"] += [["a", " "], ["a ", "b"]]
    with staged(tmp_path / "tokenizer", kind="tokenizer") as folder:
        save_tokenizer(Tokenizer.from_str(json.dumps(tree)), folder)
    shards = make_shards(tmp_path / "shards", corpus_file, tmp_path / "tokenizer")
    run_dir = make_saved_run(tmp_path / "run", shards, tmp_path / "tokenizer", {})
    export(run_dir, model_at(run_dir, 3), 3, tmp_path / "model")
    assert merges(tmp_path / "model")[-2:] == [["a", " "], ["a ", "b"]]


def test_export_takes_no_other_files_of_tokenizer_folder(
    export_with: Export, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A model in the tokenizer's folder would replace the weights."""
    tokenizer = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    for name in ("model.safetensors", "config.json", "README.md", "pytorch_model.bin", "notes"):
        (tokenizer / name).write_text("{}")
    (tokenizer / "tokens.py").symlink_to("/etc/passwd")
    (tokenizer / "merges.txt").unlink()
    (tokenizer / "merges.txt").symlink_to("/etc/passwd")
    model = export_with(tokenizer)
    assert names(model) == FILES
    assert "root:" not in (model / "merges.txt").read_text()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_export_refuses_links_out_of_tokenizer_folder(
    name: str, export_with: Export, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "secret.json").write_text('{"password": 1}')
    (tokenizer / name).unlink(missing_ok=True)
    (tokenizer / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder: put the file"):
        export_with(tokenizer)
    assert not (tmp_path / "model").exists()


def test_export_reads_tokenizer_of_hub_cache(
    export_with: Export, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The cache has links to its blobs, and a folder of earlier releases has more files."""
    blobs = tmp_path / "models--me--mine" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    shutil.copytree(tokenizer_dir, blobs)
    special = {"additional_special_tokens": ["<extra>"], "mask_token": "<mask>"}
    (blobs / "special_tokens_map.json").write_text(json.dumps(special))
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    model = export_with(snapshot)
    assert names(model) == FILES | {"special_tokens_map.json"}
    assert json.loads((model / "special_tokens_map.json").read_bytes()) == special


def test_damaged_special_tokens_stop_export(
    export_with: Export, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (tokenizer / "added_tokens.json").write_text("[")
    with pytest.raises(UserError, match=r"added_tokens\.json is not a tokenizer's config"):
        export_with(tokenizer)


def test_added_tokens_and_settings_reach_export(
    corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    own = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    own.add_tokens([AddedToken("kritik", single_word=True)])
    with staged(tmp_path / "tokenizer", kind="tokenizer") as folder:
        save_tokenizer(own, folder)
        path = folder / "tokenizer_config.json"
        config = {**json.loads(path.read_bytes()), "auto_map": {"AutoTokenizer": ["a.B", None]}}
        path.write_text(json.dumps(config))
    shards = make_shards(tmp_path / "shards", corpus_file, tmp_path / "tokenizer")
    run_dir = make_saved_run(tmp_path / "run", shards, tmp_path / "tokenizer", {})
    export(run_dir, model_at(run_dir, 3), 3, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.tokenize("reine kritik")[-1] == "kritik"
    assert "auto_map" not in (tmp_path / "model" / "tokenizer_config.json").read_text()


def test_metaspace_tokenizer_has_what_older_readers_need(corpus_file: Path, tmp_path: Path) -> None:
    """transformers 4.30 to 4.34 read the setting of a leading space by another name."""
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace()])
    own.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(SPECIAL_TOKENS), unk_token="<unk>"
    )
    own.train_from_iterator(corpus_file.read_text().splitlines()[:500], trainer)
    tree = json.loads(_for_older_readers(own))
    assert tree["pre_tokenizer"]["pretokenizers"][0]["add_prefix_space"] is True
    assert tree["decoder"]["add_prefix_space"] is True
    assert "merges" not in tree["model"]
    again = Tokenizer.from_str(json.dumps(tree))
    assert again.encode("Two  words, 12.").ids == own.encode("Two  words, 12.").ids
