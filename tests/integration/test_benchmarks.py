"""Tests that the benchmarks run at their smallest sizes; no test checks a duration."""

import sys

import pytest

from tests.helpers.commands import ROOT, run_program

pytestmark = pytest.mark.slow

# curves.py needs matplotlib, which is no dependency of the tests.
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


def benchmark_output(name: str, *arguments: object, code: int | None = 0) -> str:
    return run_program([sys.executable, f"benchmarks/{name}.py", *arguments], code=code).stdout


def test_every_benchmark_prints_its_help() -> None:
    said = run_program(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'){HELP}", *PROGRAMS],
        code=0,
    ).stdout
    assert all(f"usage: {name}" in said for name in PROGRAMS)


def test_scale_benchmark_opens_simulated_corpus() -> None:
    said = benchmark_output("scale", "--tokens", "3e8")
    assert "| text, at 4.4 bytes a token | 0.00 TB in 1 files |" in said
    assert "| sequences of 512 | 582,411: 71 steps of 8,192 an epoch |" in said
    assert "| 1 | 100.0% | 1 GB |" in said


def test_step_time_benchmark_models_many_gpus() -> None:
    assert "| 4 A100 a node, one 100 Gbit/s card | 1024 |" in benchmark_output("step_time")


def test_isolated_benchmark_compares_and_times() -> None:
    sizes = [
        "--rows=1",
        "--seq_len=64",
        "--mean_document=20",
        "--layers=1",
        "--hidden_size=64",
        "--seconds=0.01",
    ]
    said = benchmark_output("isolated", *sizes, code=None)  # the exit code tells exactness
    assert "isolated, mask, fp32" in said and "tokens a second" in said
