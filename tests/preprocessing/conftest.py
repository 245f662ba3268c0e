"""Fixtures: jobs that tokenize the corpus, and a URL without a server."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> MakeJob:
    """Return a maker of jobs of many pieces; documents are lines, some of them repeated."""

    def make(
        name: str,
        *,
        piece_bytes: int = 20_000,
        unique: bool = False,
        files: list[Path] | None = None,
    ) -> Job:
        cut = pieces(
            find_files([str(file) for file in files or [corpus_file]]), "line", piece_bytes
        )
        return Job(
            cut,
            "line",
            "text",
            tokenizer_dir,
            tmp_path / name,
            {"input": ["x"]},
            held_out_share=0.1,
            unique=unique,
        )

    return make


@pytest.fixture(scope="module")
def closed_url() -> Iterator[str]:
    """Yield a URL whose port is bound and has no server."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
