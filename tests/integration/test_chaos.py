"""A short chaos: what users run on their own storage for a quarter of an hour."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import script

pytestmark = pytest.mark.slow


def test_nothing_is_lost_in_a_chaos_of_kills_and_corruptions(tmp_path: Path) -> None:
    done = script("chaos", "--work", tmp_path / "chaos", "--kills", 4, "--corruptions", 2, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads((tmp_path / "chaos" / "tally.json").read_text())
    assert sum(tally["kills"].values()) >= 4 and sum(tally["corruptions"].values()) == 2
    assert tally["runs"] > 0 and not tally["undetected"] and not tally["different"]
    assert tally["detected"] == 2
    again = script("chaos", "--work", tmp_path / "chaos", "--kills", 4, "--corruptions", 2, "--seed", 1)
    assert again.returncode == 0
    assert again.stdout == done.stdout  # all of it was done before
