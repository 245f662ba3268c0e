"""A tokenization that is killed goes on with what it had not done."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.files import content


def test_killed_at_any_time_it_redoes_what_was_not_done_and_nothing_else(corpus_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_text(corpus_file.read_text(encoding="utf-8") * 60, encoding="utf-8")  # 5 pieces of 4 MiB
    arguments = ["scripts/tokenize_corpus.py", "--input", large, "--tokenizer", tokenizer_dir, "--processes", "2", "--output"]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *map(str, arguments), str(tmp_path / name)], cwd=ROOT, env=ENVIRONMENT)

    pieces_of_killed = tmp_path / ".killed.partial" / "pieces"
    finished: dict[str, int] = {}
    for _ in range(2):  # each time one piece is done, or two that end at once
        with start("killed") as process:
            while len(list(pieces_of_killed.glob("*.json"))) <= len(finished):
                time.sleep(0.01)
                assert process.poll() is None
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=20)[1]  # its children end with it
        for name, modified in finished.items():
            assert (pieces_of_killed / name).stat().st_mtime_ns == modified
        finished = {path.name: path.stat().st_mtime_ns for path in pieces_of_killed.glob("*.json")}
        assert len(finished) < 5 and not (tmp_path / "killed").exists()
    assert start("killed").wait() == start("undisturbed").wait() == 0
    assert content(tmp_path / "killed").keys() == content(tmp_path / "undisturbed").keys()
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
