"""Tests of the package's layout: folders import downwards, heavy libraries stay in few folders."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kantai

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kantai"

# The package's docstring lists the folders, bottom first.
ORDER = [
    name.removesuffix(".py")
    for name in re.findall(r"^    (\w+(?:\.py|/)) ", kantai.__doc__ or "", re.M)
]
ORDER = [name.rstrip("/") for name in ORDER]
TORCH_FREE = ("errors", "config", "storage", "cluster", "preprocessing")


def imported(path: Path) -> set[str]:
    """Return the dotted names of all imports in a file.

    ``from a import b`` counts as ``a`` and ``a.b``.
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
    """Return the files of a folder of the package, or its single file."""
    return (
        [PACKAGE / f"{folder}.py"]
        if (PACKAGE / f"{folder}.py").exists()
        else sorted((PACKAGE / folder).glob("*.py"))
    )


def folders(path: Path) -> set[str]:
    """Return the folders of the package that a file imports from."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("kantai.")} & set(
        ORDER
    )


def modules(path: Path) -> set[Path]:
    """Return the files of the package that a file imports."""
    found = (
        PACKAGE.parent / f"{name.replace('.', '/')}.py"
        for name in imported(path)
        if name.startswith("kantai")
    )
    return {file for file in found if file.exists()}


def test_docstring_lists_every_folder() -> None:
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


def test_modules_have_no_import_cycle() -> None:
    graph = {path: modules(path) for path in PACKAGE.rglob("*.py")}
    while leaves := [path for path, needs in graph.items() if not needs & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_package_init_files_hold_only_docstrings(path: Path) -> None:
    docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node).split(" = ")[0] for node in rest] == (
        ["__version__"] if path.parent == PACKAGE else []
    )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_heavy_libraries_stay_in_their_folders(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path)}
    folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if folder in TORCH_FREE or (folder == "data" and path.name != "loader.py"):
        assert found.isdisjoint({"torch", "transformers", "safetensors"})
    if folder != "distributed":
        assert found.isdisjoint({"accelerate", "deepspeed"})


def test_run_dir_imports_no_torch() -> None:
    """``pretrain.py --check`` and errors about bad input need not wait for the import of torch."""
    code = (
        "import sys, kantai.training.run_dir; "
        "print({'torch', 'transformers', 'accelerate'} & sys.modules.keys() or 'quick')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "quick\n"
