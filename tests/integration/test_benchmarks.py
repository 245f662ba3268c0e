"""Does a step still cost much less than transformers' Trainer takes for it? A ratio of two that run at once, on any machine.

And do the benchmarks that only the documentation needs still run?
"""

import subprocess
import sys

from tests.helpers.commands import ENVIRONMENT, ROOT


def printed(name: str, *arguments: str) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tokens_a_second_are_a_multiple_of_trainers() -> None:
    printed("speed", "--check")


def test_a_corpus_on_paper_is_opened_by_the_real_code() -> None:
    said = printed("scale", "--tokens", "1e9")
    assert "| text, at 4.4 bytes a token | 0.00 TB in 4 files |" in said
    assert "| sequences of 512 | 1,941,293: 236 steps of 8,192 an epoch |" in said
    assert "| 1 | 100.0% | 2 GB |" in said
