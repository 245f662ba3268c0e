"""A run from shards behind a password goes on with it, and writes it nowhere."""

import base64
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kantai.output import REDACTED
from tests.helpers.commands import pretrain_command, run_program, script
from tests.helpers.files import file_contents

pytestmark = pytest.mark.slow

PASSWORD = "hunter2hunter2"


class Guarded(http.server.SimpleHTTPRequestHandler):
    """A server that sends files to those who know the password."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        expected = base64.b64encode(f"kant:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] == f"Basic {expected}":
            super().do_GET()
        else:
            self.send_error(401)


@pytest.fixture
def guarded(shards_dir: Path) -> Iterator[str]:
    handler = functools.partial(Guarded, directory=str(shards_dir))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_run_goes_on_with_a_password_that_it_does_not_record(
    guarded: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    settings = [
        f"--data.tokenizer={tokenizer_dir}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--run_dir={tmp_path / 'run'}",
        "--checkpoint.every_steps=2",
    ]
    shards = f"--data.shards=http://kant:{PASSWORD}@{guarded}"
    command = pretrain_command(None, *settings, shards, "--training.max_steps=4")
    outputs = [run_program(command, code=0)]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    outputs.append(run_program(command, code=0))
    assert "4 steps, 2 done" in outputs[1].stdout
    # A run that is asked to go on, or evaluated, with what it has recorded says what it lacks.
    done = script("evaluate", tmp_path / "run")
    assert done.returncode == 2
    assert f"kant:{REDACTED}@{guarded}: a run records no passwords" in done.stderr
    for file, written in file_contents(tmp_path).items():
        assert PASSWORD.encode() not in written, file
    assert PASSWORD not in "".join(output.stdout + output.stderr for output in outputs)
