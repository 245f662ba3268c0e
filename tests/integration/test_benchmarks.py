"""The benchmarks run, in their smallest forms; how long anything takes is nobody's failure here."""

import sys

import pytest

from tests.helpers.commands import ROOT, run_program

pytestmark = pytest.mark.slow

# curves.py needs matplotlib, which nothing else here does.
PROGRAMS = sorted(
    path.name
    for path in (ROOT / "benchmarks").glob("*.py")
    if path.stem not in ("curves", "programs", "timing")
)
HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"benchmarks/{name}", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, name
"""


def printed(name: str, *arguments: object, code: int | None = 0) -> str:
    return run_program([sys.executable, f"benchmarks/{name}.py", *arguments], code=code).stdout


def test_every_one_finds_what_it_imports() -> None:
    said = run_program(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'){HELP}", *PROGRAMS],
        code=0,
    ).stdout
    assert all(f"usage: {name}" in said for name in PROGRAMS)


def test_a_corpus_on_paper_is_opened_by_the_real_code() -> None:
    said = printed("scale", "--tokens", "3e8")
    assert "| text, at 4.4 bytes a token | 0.00 TB in 1 files |" in said
    assert "| sequences of 512 | 582,411: 71 steps of 8,192 an epoch |" in said
    assert "| 1 | 100.0% | 1 GB |" in said


def test_a_step_on_many_gpus_is_modelled() -> None:
    assert "| 4 A100 a node, one 100 Gbit/s card | 1024 |" in printed("step_time")


def test_isolated_documents_are_compared_and_timed() -> None:
    sizes = [
        "--rows=1",
        "--seq_len=64",
        "--mean_document=20",
        "--layers=1",
        "--hidden_size=64",
        "--seconds=0.01",
    ]
    said = printed("isolated", *sizes, code=None)  # whether all is exact there is for it to say
    assert "isolated, mask, fp32" in said and "tokens a second" in said
