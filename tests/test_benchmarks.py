"""Does an update still cost much less than transformers' Trainer takes for it? A ratio of two that run at once, on any machine."""

import subprocess
import sys

from commands import ENVIRONMENT, ROOT


def test_tokens_a_second_are_a_multiple_of_trainers() -> None:
    command = [sys.executable, "benchmarks/speed.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
