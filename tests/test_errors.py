"""Tests that errors take one line and bugs print a traceback."""

from pathlib import Path

import pytest

from tests.helpers.commands import run_python, script


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


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("OSError(116, 'Stale file handle', '/data/x')", "Stale file handle: /data/x"),
        ("TimeoutError(110, 'Connection timed out', '/data/x')", "Connection timed out: /data/x"),
        ("OSError(23, 'Too many open files in system', '/x')", "Too many open files in system: /x"),
        ("OSError(5, 'Input/output error')", "[Errno 5] Input/output error"),
        ("SafetensorError('Stale file handle (os error 116)')", "Stale file handle (os error 116)"),
    ],
)
def test_passing_error_ends_with_74_in_one_line(raised: str, message: str) -> None:
    ran = run_python(
        "from kantai.errors import run_command\nfrom safetensors import SafetensorError\n"
        f"def main():\n    raise {raised}\nrun_command(main)"
    )
    said = f"error: {message}; this may pass: run the same command again\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (74, "", said)


def test_programs_end_with_74_where_a_read_fails(tmp_path: Path) -> None:
    """The kernel answers a read of this file with EIO, to Python and to Rust."""
    fails = Path("/proc/self/mem")
    done = script("pretrain", "--config", fails, "--check")
    assert (done.returncode, done.stderr.count("\n")) == (74, 1)
    assert "error: cannot read the config /proc/self/mem: Input/output error" in done.stderr

    (tmp_path / "tokenizer.json").symlink_to(fails)
    (tmp_path / "text.txt").write_text("Kant")
    where = ["--output", tmp_path / "shards", "--tokenizer", tmp_path]
    done = script("tokenize_corpus", "--input", tmp_path / "text.txt", *where)
    assert (done.returncode, done.stderr.count("\n")) == (74, 1)
    assert "tokenizer.json is not a tokenizer: Input/output error" in done.stderr


def test_config_that_is_missing_ends_with_2(tmp_path: Path) -> None:
    done = script("pretrain", "--config", tmp_path / "none.yaml", "--check")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
