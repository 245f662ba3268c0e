"""A program that fails says so in one line; a bug in it is shown in full."""

from pathlib import Path

import pytest

from tests.helpers.commands import run_python


def test_full_disk_is_said_in_one_line_by_a_library_written_in_rust(tmp_path: Path) -> None:
    """Such libraries raise exceptions of their own, not OSError."""
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
        # What safetensors raises on a full disk.
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


def test_a_bug_is_not_dressed_up_as_bad_input() -> None:
    ran = run_python(
        "from kantai.errors import run_command\ndef main():\n    raise RuntimeError('a "
        "bug')\nrun_command(main)"
    )
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "RuntimeError: a bug" in ran.stderr
