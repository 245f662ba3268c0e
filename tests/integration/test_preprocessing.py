"""Test of a killed tokenization: the next start does the missing pieces only."""

import functools
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import MAX_SECONDS, Program, wait_until
from tests.helpers.files import file_contents

pytestmark = pytest.mark.slow


def test_killed_tokenization_redoes_only_missing_pieces(
    corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large.txt"
    # The file has five pieces of 4 MiB.
    large.write_text(corpus_file.read_text(encoding="utf-8") * 60, encoding="utf-8")
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
    for _ in range(2):  # each round finishes one piece, or two that end together
        program = start("killed")
        wait_until(functools.partial(are_done, len(finished) + 1), program)
        workers = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        program.wait()
        assert not psutil.wait_procs(workers, timeout=MAX_SECONDS)[1]  # workers end too
        for name, modified in finished.items():
            assert (pieces_of_killed / name).stat().st_mtime_ns == modified
        finished = {path.name: path.stat().st_mtime_ns for path in pieces_of_killed.glob("*.json")}
        assert len(finished) < 5 and not (tmp_path / "killed").exists()
    assert start("killed").wait_for_end() == start("undisturbed").wait_for_end() == 0
    assert (
        file_contents(tmp_path / "killed").keys() == file_contents(tmp_path / "undisturbed").keys()
    )
    assert file_contents(tmp_path / "killed") == file_contents(tmp_path / "undisturbed")
