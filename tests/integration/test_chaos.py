"""Test of a short chaos run; users run a quarter of an hour of it on their own storage."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import script
from tests.helpers.runs import metrics

pytestmark = pytest.mark.slow


def test_chaos_run_loses_nothing(tmp_path: Path) -> None:
    done = script(
        "chaos", "--work", tmp_path / "chaos", "--kills", 4, "--corruptions", 2, "--seed", 1
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads((tmp_path / "chaos" / "tally.json").read_text())
    assert sum(tally["kills"].values()) >= 4 and sum(tally["corruptions"].values()) == 2
    assert tally["runs"] > 0 and not tally["undetected"] and not tally["different"]
    assert tally["detected"] == 2
    # The NaN belongs to the data of steps 7, 19, 28 to 30 and 37. The run skips the data of 28 to
    # 30, so that step 33 reads the data of 37.
    skipped = metrics(tmp_path / "chaos" / "undisturbed", "train/skipped")
    assert [step for step, is_skipped in enumerate(skipped) if is_skipped] == [7, 19, 33]
    again = script(
        "chaos", "--work", tmp_path / "chaos", "--kills", 4, "--corruptions", 2, "--seed", 1
    )
    assert again.returncode == 0
    assert again.stdout == done.stdout  # the second start finds all work done
