"""Shared fixtures: a small corpus, a tokenizer and shards, made once a session.

Tests share the folders: a test that damages a folder copies it first.
"""

import os
from collections.abc import Generator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from kantai.data.tokenizer import save_tokenizer
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import merge
from kantai.preprocessing.tokenize import tokenize
from kantai.preprocessing.tokenizer_training import train_tokenizer
from kantai.storage.atomic import staged
from tests.helpers import commands

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Fixed examples: only a change can make a test fail. No deadline: durations depend on the load of
# the machine. pytest --hypothesis-profile=exploring tries other examples.
settings.register_profile(
    "same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("exploring", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")

CORPUS_CHARACTERS = 350_000
VOCAB_SIZE = 1000
HELD_OUT_SHARE = 0.05
LOGS = ("*.log", "*.out", "stacks/*.txt")
LONGEST = (
    "test_training.py",
    "test_slurm.py",
    "test_backends.py",
    "test_stream.py",
    "test_verify.py",
)

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.fixture(scope="session", autouse=True)
def outputs_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set the folder for the output of programs."""
    commands.outputs_dir = tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 2,000 paragraphs of English, the beginning of Python's bundled language reference."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    path.write_text(text[:CORPUS_CHARACTERS] + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """Train a tokenizer of 1,000 entries and save it as ``scripts/train_tokenizer.py`` does."""
    target = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    with staged(target, kind="tokenizer") as folder:
        texts = (
            text
            for piece in pieces(find_files([str(corpus_file)]), "paragraph")
            for text in documents(piece, "paragraph")
        )
        save_tokenizer(train_tokenizer(texts, VOCAB_SIZE, 2), folder)
    return target


@pytest.fixture(scope="session")
def shards_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> Path:
    """Make shards of the corpus's paragraphs, a twentieth of them held out."""
    return make_shards(tmp_path_factory.mktemp("shards") / "shards", corpus_file, tokenizer_dir)


@pytest.fixture(scope="session")
def many_shards_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> Path:
    """Make about twenty shards of the same paragraphs."""
    return make_shards(
        tmp_path_factory.mktemp("many") / "shards",
        corpus_file,
        tokenizer_dir,
        CORPUS_CHARACTERS // 20,
    )


def make_shards(
    target: Path, corpus_file: Path, tokenizer_dir: Path, piece_bytes: int | None = None
) -> Path:
    """Make shards of a text's paragraphs with kantai's own functions, in this process."""
    cut = pieces(find_files([str(corpus_file)]), "paragraph", piece_bytes)
    job = Job(
        cut,
        "paragraph",
        "text",
        tokenizer_dir,
        target,
        {"input": [str(corpus_file)], "document": "paragraph"},
        HELD_OUT_SHARE,
    )
    tokenize(job, processes=1)
    merge(job, *([0] if piece_bytes else []))  # small pieces stay shards of their own
    return target


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first: otherwise one core does them alone at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_runtest_setup() -> None:
    """Kill the programs that an earlier failed test has left running."""
    for program in commands.started_programs:
        if program.poll() is None:
            program.kill_all()
    commands.started_programs.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report the ends of the outputs and logs of a failed test's programs."""
    report = yield
    if report.failed:
        report.sections += [
            (f"program {number}", program.report())
            for number, program in enumerate(commands.started_programs, 1)
        ]
        fixtures = getattr(item, "funcargs", {}).values()
        folders = [value for value in fixtures if isinstance(value, Path)] + [
            value.logs for value in fixtures if hasattr(value, "logs")
        ]
        logs = {
            path
            for folder in folders
            for pattern in LOGS
            for path in folder.rglob(pattern)
            if path.is_file()
        }
        report.sections += [
            (str(path), commands.end_of(path.read_text(errors="replace"))) for path in sorted(logs)
        ]
    return _without_skipping(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _without_skipping((yield))


def _without_skipping(report: Report) -> Report:
    """Turn a skipped test into a failure where CI is set: a test must run to prove anything."""
    if report.skipped and os.environ.get("CI"):
        report.result = "failed"
        report.longrepr = f"skipped: {report.longrepr}"
    return report
