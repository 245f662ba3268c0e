"""What several test files need: a small text, a tokenizer and shards, made once a session by the real functions.

The folders are shared: a test that wants to damage one copies it first.
"""

import os
from collections.abc import Generator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import pytest

from kantai.checkpoint import staged
from kantai.corpus import documents, find_files
from kantai.shards import write_shards
from kantai.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, and none shall pass or fail by it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CORPUS_CHARACTERS = 350_000
VOCAB_SIZE = 1000
HELD_OUT_SHARE = 0.05

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 paragraphs of English: the beginning of the language reference that every Python carries."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    path.write_text(text[:CORPUS_CHARACTERS] + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A tokenizer of 1,000 entries, sealed as ``scripts/train_tokenizer.py`` seals it."""
    target = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    with staged(target, kind="tokenizer") as folder:
        save_tokenizer(train_tokenizer(documents([corpus_file], "paragraph"), VOCAB_SIZE, 2), folder)
    return target


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Path:
    """The text's paragraphs as shards, a twentieth of them held out."""
    target = tmp_path_factory.mktemp("shards") / "shards"
    vocabulary = load_tokenizer(tokenizer_dir)
    write_shards(
        documents(find_files([str(corpus_file)]), "paragraph"),
        target,
        encode=vocabulary.encode,
        vocab_size=vocabulary.size,
        eos_id=vocabulary.eos_id,
        fingerprint=vocabulary.fingerprint,
        source={"files": [str(corpus_file)], "document": "paragraph"},
        held_out_share=HELD_OUT_SHARE,
    )
    return target


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _without_skipping((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _without_skipping((yield))


def _without_skipping(report: Report) -> Report:
    """Where CI is set, a skipped test is a failure: what is not run is not known to work."""
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report
