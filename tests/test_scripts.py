"""Programs are a few lines that parse and call."""

from pathlib import Path

import pytest

from tests.helpers.commands import ROOT


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name
)
def test_scripts_only_parse_and_call(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 100
