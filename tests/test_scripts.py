"""Test that scripts stay short: they parse arguments and call the package."""

from pathlib import Path

import pytest

from tests.helpers.commands import ROOT


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name
)
def test_scripts_have_at_most_100_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 100
