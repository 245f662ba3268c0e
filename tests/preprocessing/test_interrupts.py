"""The programs that prepare data end soon after Ctrl-C, and leave nothing half-written."""

import os
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import Program, wait_until


def write_letters(path: Path, lines: int) -> None:
    """Write what takes long to train on, and to tokenize: lines of one word of 900 letters."""
    numbers = random.Random(path.name).randbytes(900 * lines)
    letters = numbers.translate(bytes(b"ACGT"[number % 4] for number in range(256)))
    parts = (letters[start : start + 900] for start in range(0, len(letters), 900))
    path.write_bytes(b"\n".join(parts))


def interrupt(program: Program, number: signal.Signals) -> None:
    """Send a signal to a program that would compute for a minute, and wait for its end."""
    program.send_signal(number)
    program.wait_for_end()


def has_read(program: Program, path: Path) -> bool:
    """Whether a program has come to the end of a file, so that it computes by now."""
    with_open = {file.path for file in psutil.Process(program.pid).open_files()}
    times = psutil.Process(program.pid).cpu_times()
    return str(path) not in with_open and times.user > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_signal_ends_tokenizer_training(tmp_path: Path, number: signal.Signals, code: int) -> None:
    corpus = tmp_path / "corpus.txt"
    write_letters(corpus, 20_000)
    command = [sys.executable, "scripts/train_tokenizer.py", f"--input={corpus}"]
    program = Program([*command, f"--output={tmp_path / 'tokenizer'}"])
    wait_until(lambda: has_read(program, corpus), program)
    interrupt(program, number)
    assert program.returncode == code, program.report()
    assert program.err == ""
    left = {path.name for path in tmp_path.iterdir()} - {".tokenizer.partial", ".tokenizer.lock"}
    assert left == {"corpus.txt"}
    assert number != signal.SIGINT or not (tmp_path / ".tokenizer.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_signal_ends_tokenizing(
    tmp_path: Path, tokenizer_dir: Path, number: signal.Signals, code: int
) -> None:
    files = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for path in files:
        write_letters(path, 30_000)
    command = [sys.executable, "scripts/tokenize_corpus.py", "--processes=2", "--input", *files]
    where = [f"--tokenizer={tokenizer_dir}", f"--output={tmp_path / 'shards'}"]
    program = Program([*command, *where])
    workers = psutil.Process(program.pid)
    wait_until(
        lambda: sum(child.cpu_times().user > 2 for child in workers.children()) == 2, program
    )
    children = workers.children()
    interrupt(program, number)
    assert program.returncode == code, program.report()
    assert "Traceback" not in program.err
    assert not (tmp_path / "shards").exists()
    _, alive = psutil.wait_procs(children, 60)
    assert not [child for child in alive if os.getpid() != child.pid], program.report()
