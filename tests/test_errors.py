"""Tests that errors take one line and bugs print a traceback."""

from pathlib import Path

import pytest

from tests.helpers.commands import run_python


def test_rust_library_reports_full_disk_in_one_line(tmp_path: Path) -> None:
    """Rust libraries raise their own exceptions instead of OSError."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    code = f"""
import pathlib
from kantai.errors import run_command
from kantai.data.tokenizer import save_tokenizer
from kantai.preprocessing.tokenizer_training import train_tokenizer
run_command(lambda: save_tokenizer(train_tokenizer(["a"], 261, 2), pathlib.Path({str(tmp_path)!r})))
"""
    ran = run_python(code)
    assert (ran.returncode, ran.stderr) == (
        2,
        "error: no space left on the device: free some and run the same command again\n",
    )


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("UserError('two\\nlines')", "error: two lines\n"),
        # safetensors raises this on a full disk.
        (
            "__import__('safetensors').SafetensorError('Error while serializing: I/O error: No "
            "space left on device (os error 28)')",
            "error: no space left on the device: free some and run the same command again\n",
        ),
        (
            "PermissionError(13, 'Permission denied', '/root/x')",
            "error: Permission denied: /root/x\n",
        ),
        (
            "OSError(28, 'No space left on device', '/data/x')",
            "error: no space left on /data/x: free some and run the same command again\n",
        ),
    ],
)
def test_commands_fail_in_one_line(raised: str, message: str) -> None:
    ran = run_python(
        "from kantai.errors import UserError, run_command\ndef main():\n    raise "
        f"{raised}\nrun_command(main)"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", message)


def test_bug_prints_a_traceback() -> None:
    ran = run_python(
        "from kantai.errors import run_command\ndef main():\n    raise RuntimeError('a "
        "bug')\nrun_command(main)"
    )
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "RuntimeError: a bug" in ran.stderr
