"""The schema accepts epochs in place of max_steps, and refuses invalid stages."""

from pathlib import Path

import pytest

from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.errors import UserError

SMALLEST = (
    "run_dir: runs/a\ndata: {shards: shards, tokenizer: tokenizer}\ntraining: {max_steps: 10}\n"
)


def load(tmp_path: Path, text: str = SMALLEST, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_epochs_replace_max_steps(tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST, "--training.max_steps=null", "--training.epochs=2.5")
    assert (config.training.max_steps, config.training.epochs) == (None, 2.5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{until_step: 5}, {until_step: 5}]", "each must end after the one before"),
        ("[{until_step: 10}]", "until_step 10 must be less than training.max_steps 10"),
        ("[{until_step: 5, seq_len: 1024}]", "no seq_len may exceed data.seq_len 512"),
        ("[{until_step: 5, seqlen: 16}]", "unknown key"),
        ("[{seq_len: 16}]", "until_step is missing"),
        ("3", "stages: "),
    ],
)
def test_invalid_stages_are_refused(tmp_path: Path, stages: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, SMALLEST, f"--stages={stages}")
