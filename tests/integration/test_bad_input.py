"""Tests of bad input: a program prints one line of advice, exits with code 2, writes nothing."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kantai.data.tokenizer import save_tokenizer
from kantai.preprocessing.tokenizer_training import train_tokenizer
from kantai.storage.atomic import staged
from tests.helpers.commands import ROOT, TINY, launch_command, pretrain, run_program, script


class Inputs:
    """Good inputs, one of which a test damages; the output ``new`` must not exist afterwards."""

    def __init__(self, folder: Path, corpus: Path, tokenizer: Path, shards: Path) -> None:
        self.folder = folder
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.shards = shards
        self.new = folder / "new"

    def file(self, name: str, content: bytes) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def copy_of_shards(self) -> Path:
        return Path(shutil.copytree(self.shards, self.folder / "shards"))

    def train_tokenizer(self, *arguments: object) -> tuple[object, ...]:
        return ("train_tokenizer", "--output", self.new, *arguments)

    def tokenize(self, corpus: Path, *arguments: object) -> tuple[object, ...]:
        return (
            "tokenize_corpus",
            "--input",
            corpus,
            "--tokenizer",
            self.tokenizer,
            "--output",
            self.new,
            *arguments,
        )

    def pretrain(self, *arguments: object) -> tuple[object, ...]:
        where = [
            f"--data.shards={self.shards}",
            f"--data.tokenizer={self.tokenizer}",
            f"--run_dir={self.new}",
        ]
        return ("pretrain", "--config", ROOT / "configs/quickstart.yaml", *TINY, *where, *arguments)


@pytest.fixture
def inputs(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, shards_dir: Path) -> Inputs:
    return Inputs(tmp_path, corpus_file, tokenizer_dir, shards_dir)


def with_flipped_bit(shards: Path) -> Path:
    path = next(shards.glob("train-*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return shards


def other_tokenizer(folder: Path) -> Path:
    with staged(folder / "other", kind="tokenizer") as staging:
        save_tokenizer(train_tokenizer(["a few other words, a few other words"], 300, 2), staging)
    return folder / "other"


CASES: dict[str, tuple[Callable[[Inputs], tuple[object, ...]], str]] = {
    "missing file": (
        lambda w: w.train_tokenizer("--input", w.folder / "nothing.txt"),
        "no input at",
    ),
    "empty file": (lambda w: w.train_tokenizer("--input", w.file("empty.txt", b"")), "is empty"),
    "blank file": (lambda w: w.tokenize(w.file("blank.txt", b"\n \n")), "the input has no text"),
    "binary file": (
        lambda w: w.tokenize(w.file("binary.txt", b"text\n\0\0\0\n")),
        "line 2 has a NUL byte",
    ),
    "wrong encoding": (
        lambda w: w.tokenize(
            w.file("latin1.txt", "Ding an sich\nfür übersinnlich".encode("latin-1"))
        ),
        "line 2 is not UTF-8",
    ),
    "bad JSON": (
        lambda w: w.tokenize(w.file("a.jsonl", b'{"text": "good"}\n{"text": \n')),
        "line 2 is not JSON",
    ),
    "other field": (
        lambda w: w.tokenize(w.file("a.jsonl", b'{"content": "good"}\n')),
        "--text_field",
    ),
    "tiny vocabulary": (
        lambda w: w.train_tokenizer("--input", w.corpus, "--vocab_size", 100),
        "--vocab_size 100 is too small",
    ),
    "large sample": (
        lambda w: w.train_tokenizer("--input", w.corpus, "--sample_bytes", 1e10),
        "--sample_bytes 1e+10 must lie between",
    ),
    "driver not installed": (
        lambda w: w.train_tokenizer("--input", "gs://bucket/a.txt"),
        "pip install gcsfs",
    ),
    "no data set": (
        lambda w: w.train_tokenizer("--input", "hub:./nothing"),
        "hub:./nothing cannot be opened",
    ),
    "too little text": (
        lambda w: w.train_tokenizer("--input", w.file("a.txt", b"a")),
        "bring more text",
    ),
    "no tokenizer": (
        lambda w: (
            "tokenize_corpus",
            "--input",
            w.corpus,
            "--tokenizer",
            w.folder,
            "--output",
            w.new,
        ),
        "no tokenizer at",
    ),
    "held out too much": (
        lambda w: w.tokenize(w.corpus, "--held_out", 1.5),
        "--held_out 1.5 must lie between 0 and 1",
    ),
    "part without parts": (
        lambda w: w.tokenize(w.corpus, "--part", 0),
        "give --part and --parts together",
    ),
    "merge of a part": (
        lambda w: w.tokenize(w.corpus, "--part", 0, "--parts", 2, "--merge"),
        "and --merge without them",
    ),
    "a part too far": (
        lambda w: w.tokenize(w.corpus, "--part", 2, "--parts", 2),
        "--part 2 must be one of 0 to 1",
    ),
    "merge of nothing": (
        lambda w: w.tokenize(w.corpus, "--merge"),
        "1 of 1 pieces are not tokenized yet (0)",
    ),
    "nothing held out": (lambda w: w.tokenize(w.file("a.txt", b"one line")), "it is the only one"),
    "output exists": (
        lambda w: (
            "tokenize_corpus",
            "--input",
            w.corpus,
            "--tokenizer",
            w.tokenizer,
            "--output",
            w.shards,
        ),
        "exists already",
    ),
    "no config": (
        lambda w: ("pretrain", "--config", w.folder / "nothing.yaml"),
        "cannot read the config",
    ),
    "config that is no YAML": (
        lambda w: ("pretrain", "--config", w.file("a.yaml", b"a: [")),
        "is not YAML",
    ),
    "unknown key": (
        lambda w: w.pretrain("--optimizer.learning_rte=1"),
        "the nearest known one is 'optimizer.learning_rate'",
    ),
    "wrong type": (
        lambda w: w.pretrain("--batch.global_batch_size=many"),
        "batch.global_batch_size",
    ),
    "wrong range": (lambda w: w.pretrain("--masking.ratio=1.5"), "masking.ratio"),
    "no such packing": (lambda w: w.pretrain("--data.packing=tight"), "data.packing"),
    "long warm-up": (
        lambda w: w.pretrain("--optimizer.warmup_steps=9999"),
        "optimizer.warmup_steps 9999 is not less",
    ),
    "loose argument": (lambda w: w.pretrain("--fast"), "--section.key=value"),
    "prompt without mask": (
        lambda w: w.pretrain('--evaluation.prompts=["I think"]'),
        "must have exactly one <mask>",
    ),
    "no shards": (lambda w: w.pretrain(f"--data.shards={w.folder / 'nothing'}"), "no shards at"),
    "another tokenizer": (
        lambda w: w.pretrain(f"--data.tokenizer={other_tokenizer(w.folder)}"),
        "were made with another tokenizer",
    ),
    "small embedding": (
        lambda w: w.pretrain("--model.vocab_size=64"),
        "model.vocab_size 64 is less than",
    ),
    "long sequences": (lambda w: w.pretrain("--data.seq_len=1000000"), "less than one sequence"),
    "damaged shards": (
        lambda w: w.pretrain(f"--data.shards={with_flipped_bit(w.copy_of_shards())}"),
        "fails its checksum",
    ),
    "folder of something else": (
        lambda w: w.pretrain(f"--run_dir={w.shards}"),
        "is no run directory",
    ),
    "no run to evaluate": (lambda w: ("evaluate", w.folder), "is no run directory"),
    "no run to export": (lambda w: ("export", w.folder, "--output", w.new), "is no run directory"),
    "no model": (lambda w: ("fill_mask", w.new, "I <mask>."), "no model at"),
    "no mask": (lambda w: ("fill_mask", w.folder, "I think."), "must have exactly one <mask>"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line_and_code_2(case: str, inputs: Inputs) -> None:
    command, message = CASES[case]
    before = sorted(inputs.shards.rglob("*"))
    name, *arguments = command(inputs)
    done = script(str(name), *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not inputs.new.exists()
    assert not list(inputs.folder.glob(".*"))
    assert sorted(inputs.shards.rglob("*")) == before


@pytest.mark.slow
def test_run_dir_of_other_config_is_left_alone(inputs: Inputs) -> None:
    _, *arguments = inputs.pretrain("--training.max_steps=2")
    arguments = arguments[2 + len(TINY) :]
    pretrain(None, *arguments)
    before = {path: path.read_bytes() for path in inputs.new.rglob("*") if path.is_file()}
    for change, message in (
        ("--optimizer.learning_rate=0.5", "optimizer.learning_rate was 0.001 and is 0.5"),
        ("--seed=1", "seed was 0 and is 1"),
        ("--resume=never", "has a run already"),
    ):
        done = script("pretrain", "--config", "configs/quickstart.yaml", *TINY, *arguments, change)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in inputs.new.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_only_one_rank_prints_the_error(inputs: Inputs) -> None:
    done = run_program(
        launch_command(
            "cpu", 2, "scripts/pretrain.py", "--config", "configs/quickstart.yaml", "--seeed=1"
        )
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "unknown key 'seeed'; the nearest known one is 'seed'" in done.stderr


def test_full_disk_ends_tokenization_without_output(inputs: Inputs) -> None:
    """Root mounts a small disk; other users get a file-size limit instead."""
    small = inputs.folder / "small"
    small.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        limit = [] if os.geteuid() == 0 else ["prlimit", "--fsize=65536"]
        program = [
            sys.executable,
            "scripts/tokenize_corpus.py",
            "--input",
            inputs.corpus,
            "--tokenizer",
            inputs.tokenizer,
        ]
        done = run_program([*limit, *program, "--output", small / "shards"])
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert "no space left" in done.stderr or "File too large" in done.stderr
        assert not list(small.iterdir())
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", small], check=True)


def test_pretrain_check_writes_nothing(inputs: Inputs) -> None:
    name, *arguments = inputs.pretrain("--check")
    done = script(str(name), *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b0 of", done.stdout)
    assert not inputs.new.exists()
