"""Outputs are local folders, and one process at a time writes one."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kantai.storage.atomic import verify
from tests.helpers.commands import (
    CONFIG,
    ROOT,
    Program,
    pretrain,
    run_program,
    script,
    wait_until,
)


@pytest.mark.parametrize(
    "program", ["tokenize_corpus", "part", "train_tokenizer", "get_corpus", "export", "pretrain"]
)
def test_program_refuses_a_url_as_output(
    program: str, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, shards_dir: Path
) -> None:
    url = "s3://bucket/x"
    text = ["--input", corpus_file, "--output", url]
    tokenize = ["tokenize_corpus", *text, "--tokenizer", tokenizer_dir]
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    commands: dict[str, list[object]] = {
        "tokenize_corpus": tokenize,
        "part": [*tokenize, "--part", 0, "--parts", 2],
        "train_tokenizer": ["train_tokenizer", *text, "--vocab_size", 300],
        "get_corpus": ["get_corpus", "--output", url, "--name", "python-docs"],
        "export": ["export", tmp_path, "--output", url],
        "pretrain": ["pretrain", "--config", CONFIG, *data, "--check", f"--run_dir={url}"],
    }
    name, *arguments = commands[program]
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *arguments]
    done = run_program(command, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"error: {url} is a URL: write to a local folder")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


Start = Callable[[], Program]
_IMPATIENT = """
import runpy, sys
from kantai.storage import atomic
atomic._LOCK_WAIT_SECONDS = 4
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def impatient(command: list[object]) -> Program:
    """Start a script of a command that waits for an output's lock for seconds, not minutes."""
    return Program([sys.executable, "-c", _IMPATIENT, *command[1:]])


def stop(program: Program) -> None:
    program.send_signal(signal.SIGCONT)
    program.kill_all()


def assert_one_of_two_writes(start: Start, output: Path, has_begun: Callable[[], object]) -> None:
    """Hold a start in the midst of its work, and begin another."""
    first = start()
    try:
        wait_until(has_begun, first)
        first.send_signal(signal.SIGSTOP)
        assert not output.exists()
        second = impatient([*first.args])
        assert second.wait_for_end() == 2
        busy = f"another process is writing {output}"
        assert second.err.strip() == f"error: {busy}: wait for it, or choose another output"
        assert f"{busy}: waiting 4 seconds for it at most" in second.out
        first.send_signal(signal.SIGCONT)
        assert first.wait_for_end() == 0
    except BaseException:
        stop(first)
        raise
    verify(output)
    assert not list(output.parent.glob(f".{output.name}*"))


@pytest.fixture
def large_file(tmp_path: Path, corpus_file: Path) -> Path:
    """Some seconds of work."""
    path = tmp_path / "large.txt"
    path.write_text(corpus_file.read_text(encoding="utf-8") * 30, encoding="utf-8")
    return path


def test_two_starts_of_tokenizing_do_not_write_one_output(
    tmp_path: Path, large_file: Path, tokenizer_dir: Path
) -> None:
    output = tmp_path / "shards"
    command = [sys.executable, "scripts/tokenize_corpus.py", "--input", large_file]
    command += ["--tokenizer", tokenizer_dir, "--output", output]
    pieces = tmp_path / ".shards.partial" / "pieces"
    assert_one_of_two_writes(lambda: Program(command), output, pieces.exists)


def test_two_starts_of_tokenizer_training_do_not_write_one_output(
    tmp_path: Path, large_file: Path
) -> None:
    output = tmp_path / "tokenizer"
    command = [sys.executable, "scripts/train_tokenizer.py", "--input", large_file]
    command += ["--output", output, "--vocab_size", "400"]
    folder = tmp_path / ".tokenizer.partial"
    assert_one_of_two_writes(lambda: Program(command), output, folder.exists)


def test_merge_waits_for_a_part_that_is_tokenized(
    tmp_path: Path, large_file: Path, tokenizer_dir: Path
) -> None:
    """Parts of a job do not hinder each other."""
    output = tmp_path / "shards"
    command = [sys.executable, "scripts/tokenize_corpus.py", "--input", large_file]
    command += ["--tokenizer", tokenizer_dir, "--output", output]
    pieces = tmp_path / ".shards.partial" / "pieces"
    first = Program([*command, "--part", "0", "--parts", "2"])
    try:
        wait_until(pieces.exists, first)
        first.send_signal(signal.SIGSTOP)
        assert Program([*command, "--part", "1", "--parts", "2"]).wait_for_end() == 0
        merge = impatient([*command, "--merge"])
        assert merge.wait_for_end() == 2
        assert "another process is writing" in merge.err
        first.send_signal(signal.SIGCONT)
        assert first.wait_for_end() == 0
    except BaseException:
        stop(first)
        raise
    done = script(*(str(part) for part in ["tokenize_corpus", *command[2:], "--merge"]))
    assert done.returncode == 0, done.stderr
    verify(output)
    assert not list(tmp_path.glob(".shards*"))


def test_start_that_was_killed_does_not_hinder_the_next(tmp_path: Path, large_file: Path) -> None:
    output = tmp_path / "tokenizer"
    command = [sys.executable, "scripts/train_tokenizer.py", "--input", large_file]
    command += ["--output", output, "--vocab_size", "400"]
    first = Program(command)
    wait_until((tmp_path / ".tokenizer.partial").exists, first)
    first.kill_all()
    assert (tmp_path / ".tokenizer.lock").exists()
    assert Program(command).wait_for_end() == 0
    assert not list(tmp_path.glob(".tokenizer*"))


@pytest.mark.slow
def test_two_exports_do_not_write_one_output(
    tmp_path: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    run = tmp_path / "run"
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    pretrain(None, *data, "--training.max_steps=2", f"--run_dir={run}")
    output = tmp_path / "model"
    command = [sys.executable, "scripts/export.py", run, "--output", output]
    folder = tmp_path / ".model.partial"
    assert_one_of_two_writes(lambda: Program(command), output, folder.exists)


@pytest.mark.slow
def test_run_says_what_is_not_shown(
    tmp_path: Path, many_shards_dir: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    for name, shards in {"many": many_shards_dir, "one": shards_dir}.items():
        data = [f"--data.shards={shards}", f"--data.tokenizer={tokenizer_dir}"]
        said = pretrain(None, *data, "--training.max_steps=2", f"--run_dir={tmp_path / name}")
        assert ("an epoch does not show 0.0% of the training tokens" in said) == (name == "many")
