"""A run opens its shards, its tokenizer and the batches of its config."""

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.dataset import Data, open_data
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import load_tokenizer
from kantai.errors import UserError
from kantai.storage.atomic import digest
from tests.helpers.commands import CONFIG
from tests.helpers.tokenizer_kinds import loaded


def test_shards_of_window_stay_open(shards_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Open fetched shards take cache space, so that only one window of them stays open."""
    fsspec.filesystem("memory").put(str(shards_dir), "/window", recursive=True)
    for where, window, expected in (
        (shards_dir, 64, 512),
        (shards_dir, 600, 601),
        ("memory://window", 64, 65),
        ("memory://window", 600, 601),
    ):
        settings = [
            f"--data.shards={where}",
            f"--data.tokenizer={tokenizer_dir}",
            f"--data.cache_dir={tmp_path}",
        ]
        data = open_data(
            load_config(CONFIG, [*settings, "--data.seq_len=32", f"--data.shuffle_window={window}"])
        )
        assert [split.open_at_once for split in data.shards.splits.values()] == [expected] * 2


def test_masking_config_changes_training_rows_only(shards_dir: Path, tokenizer_dir: Path) -> None:
    def batches(**masking: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the labels of the first and last training step, and held-out ids."""
        tree = {
            "run_dir": "",
            "data": {"shards": str(shards_dir), "tokenizer": str(tokenizer_dir), "seq_len": 64},
        }
        sizes = {"global_batch_size": 64, "micro_batch_size": 64}
        data = open_data(
            Config.model_validate(
                tree | {"training": {"max_steps": 9}, "masking": masking, "batch": sizes}
            )
        )
        training = data.training_batches(1)
        held_out = data.held_out_batches(rows=64)[0]
        return (
            training.micro_batch(0, 0, 0).labels,
            training.micro_batch(8, 0, 0).labels,
            held_out.micro_batch(0, 0, 0).input_ids,
        )

    *_, expected = batches()
    for unit, slots in [("token", 10), ("word", 17), ("span", 10)]:
        first, last, held_out = batches(unit=unit)
        assert first.shape == last.shape == (64, slots)
        assert np.array_equal(held_out, expected)

        first, last, held_out = batches(unit=unit, final_ratio=0.6)
        assert abs((last != IGNORED_LABEL).sum() / (first != IGNORED_LABEL).sum() - 4) < 0.2
        assert np.array_equal(held_out, expected)


def opened(shards: Path, tokenizer: Path, *overrides: str) -> Data:
    where = [f"--data.shards={shards}", f"--data.tokenizer={tokenizer}", "--data.seq_len=32"]
    return open_data(load_config(CONFIG, [*where, *overrides]))


def edit_manifest(shards: Path, **entries: object) -> None:
    path = shards / "manifest.json"
    content = json.loads(path.read_text()) | entries
    del content["digest"]
    path.write_text(json.dumps({**content, "digest": digest(content)}))


def test_tokenizer_with_another_number_of_entries_is_refused(
    shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shards_dir, shards)
    edit_manifest(shards, vocab_size=1063)
    with pytest.raises(
        UserError, match=r"a tokenizer of 1063 entries, and .* has 1000: name theirs"
    ):
        opened(shards, tokenizer_dir)


def test_tokenizer_with_another_normalizer_is_refused(
    shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    loaded(tokenizer, tmp_path)
    with pytest.raises(UserError, match="were made with another tokenizer"):
        opened(shards_dir, tmp_path)


def test_shards_of_kantai_0_1_are_opened(
    shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shards_dir, shards)
    edit_manifest(shards, tokenizer=load_tokenizer(tokenizer_dir).old_fingerprint)
    assert opened(shards, tokenizer_dir).samples("train") > 0


def test_too_few_positions_are_refused_before_a_start(
    shards_dir: Path, tokenizer_dir: Path
) -> None:
    opened(shards_dir, tokenizer_dir, "--model.max_position_embeddings=34")
    message = r"max_position_embeddings 33 is less than the 34 that data\.seq_len 32 needs"
    with pytest.raises(UserError, match=message):
        opened(shards_dir, tokenizer_dir, "--model.max_position_embeddings=33")
