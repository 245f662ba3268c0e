"""A tokenization that is killed goes on with what it had not done."""

import functools
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import MAX_SECONDS, Program, wait_until
from tests.helpers.files import content

pytestmark = pytest.mark.slow


def test_killed_at_any_time_it_redoes_what_was_not_done_and_nothing_else(
    corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large.txt"
    large.write_text(
        corpus_file.read_text(encoding="utf-8") * 60, encoding="utf-8"
    )  # 5 pieces of 4 MiB
    arguments = [
        "scripts/tokenize_corpus.py",
        "--input",
        large,
        "--tokenizer",
        tokenizer_dir,
        "--processes",
        "2",
        "--output",
    ]

    def start(name: str) -> Program:
        return Program([sys.executable, *arguments, tmp_path / name])

    pieces_of_killed = tmp_path / ".killed.partial" / "pieces"

    def are_done(number: int) -> bool:
        return len(list(pieces_of_killed.glob("*.json"))) >= number

    finished: dict[str, int] = {}
    for _ in range(2):  # each time one piece is done, or two that end at once
        program = start("killed")
        wait_until(functools.partial(are_done, len(finished) + 1), program)
        workers = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        program.wait()
        assert not psutil.wait_procs(workers, timeout=MAX_SECONDS)[1]  # its children end with it
        for name, modified in finished.items():
            assert (pieces_of_killed / name).stat().st_mtime_ns == modified
        finished = {path.name: path.stat().st_mtime_ns for path in pieces_of_killed.glob("*.json")}
        assert len(finished) < 5 and not (tmp_path / "killed").exists()
    assert start("killed").ended() == start("undisturbed").ended() == 0
    assert content(tmp_path / "killed").keys() == content(tmp_path / "undisturbed").keys()
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
