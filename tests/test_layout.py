"""The one-way rule of the package: imports go down the floors, and the heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

PACKAGE = ROOT / "kantai"

# kantai/__init__.py (UserError, run_command) lies below all of them.
FLOORS = (
    ("config", "cluster", "cache", "files", "lines", "checkpoint", "rng"),
    ("metrics", "corpus", "sample", "starter", "tokenizer", "shards", "order", "batches", "masking"),
    ("data", "model", "optim", "tokenizing"),
    ("rundir", "engine", "evaluate", "ledger", "loader"),
    ("saving", "export", "preflight"),
    ("train",),
    ("verify", "chaos"),
)
# A module may be a folder, whose files import each other.
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it; ``from a import b`` counts as ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, ("kantai" if node.level else "", node.module)))
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return names


def files(module: str) -> list[Path]:
    """The file of a module, or the files of one that is a folder."""
    return [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else sorted((PACKAGE / module).glob("*.py"))


def libraries(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def siblings(path: Path) -> set[str]:
    """Modules of kantai that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("kantai.")} & FLOOR_OF.keys()


def test_every_module_has_a_floor() -> None:
    assert sorted(path for module in FLOOR_OF for path in files(module)) == sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})


def test_the_bottom_imports_nothing_of_ours() -> None:
    assert siblings(PACKAGE / "__init__.py") == set()


@pytest.mark.parametrize("module", FLOOR_OF)
def test_imports_go_down_the_floors(module: str) -> None:
    others = set().union(*map(siblings, files(module))) - {module}
    not_below = {other for other in others if FLOOR_OF[other] >= FLOOR_OF[module]}
    assert not not_below, f"{module} (floor {FLOOR_OF[module]}) imports {not_below}"


@pytest.mark.parametrize("module", FLOOR_OF)
def test_heavy_libraries_stay_where_they_belong(module: str) -> None:
    found = set().union(*map(libraries, files(module)))
    if FLOOR_OF[module] < 2:
        assert found.isdisjoint({"torch", "transformers", "safetensors"})
    if module != "engine":
        assert found.isdisjoint({"accelerate", "deepspeed"})


def test_looking_at_a_run_needs_no_torch() -> None:
    """``pretrain.py --check`` and every complaint about bad input come before the seconds that torch takes."""
    code = "import sys, kantai.rundir; print({'torch', 'transformers', 'accelerate'} & sys.modules.keys() or 'quick')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "quick\n"
