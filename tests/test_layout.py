"""The one-way rule of the package: folders import downwards, and heavy libraries stay in theirs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kantai

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kantai"

# The order that the package's own docstring prints, bottom first.
ORDER = [
    name.removesuffix(".py")
    for name in re.findall(r"^    (\w+(?:\.py|/)) ", kantai.__doc__ or "", re.M)
]
ORDER = [name.rstrip("/") for name in ORDER]
TORCH_FREE = ("errors", "config", "storage", "cluster", "preprocessing")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it; ``from a import b`` counts as
    ``a`` and ``a.b``.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    """The files of a folder of the package, or its one file."""
    return (
        [PACKAGE / f"{folder}.py"]
        if (PACKAGE / f"{folder}.py").exists()
        else sorted((PACKAGE / folder).glob("*.py"))
    )


def folders(path: Path) -> set[str]:
    """Folders of the package that a file imports from."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("kantai.")} & set(
        ORDER
    )


def modules(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    found = (
        PACKAGE.parent / f"{name.replace('.', '/')}.py"
        for name in imported(path)
        if name.startswith("kantai")
    )
    return {file for file in found if file.exists()}


def test_the_docstring_lists_every_folder() -> None:
    there = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert set(ORDER) == there - {"__init__"}
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("folder", ORDER)
def test_folders_import_downwards_only(folder: str) -> None:
    above = set(ORDER[ORDER.index(folder) + 1 :])
    for path in files(folder):
        assert not folders(path) & above, path


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {path: modules(path) for path in PACKAGE.rglob("*.py")}
    while leaves := [path for path, needs in graph.items() if not needs & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_packages_hold_a_docstring_alone(path: Path) -> None:
    docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node).split(" = ")[0] for node in rest] == (
        ["__version__"] if path.parent == PACKAGE else []
    )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path)}
    folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if folder in TORCH_FREE or (folder == "data" and path.name != "loader.py"):
        assert found.isdisjoint({"torch", "transformers", "safetensors"})
    if folder != "distributed":
        assert found.isdisjoint({"accelerate", "deepspeed"})


def test_looking_at_a_run_needs_no_torch() -> None:
    """``pretrain.py --check`` and every complaint about bad input come before the seconds that
    torch takes.
    """
    code = "import sys, kantai.training.run_dir; print({'torch', 'transformers', 'accelerate'} & sys.modules.keys() or 'quick')"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "quick\n"
