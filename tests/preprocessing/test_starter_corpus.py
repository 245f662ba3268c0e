"""Tests of the starter corpus with a good network, a bad network, and none."""

import contextlib
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kantai.errors import UserError
from kantai.preprocessing.starter_corpus import PROMPTS, FetchError, fetch, write_starter
from tests.helpers.commands import run_python

BOUNDS = (1000, 20_000)
SLOW_BYTES = 1500
KANT = "Reason without intuition is empty.\r\n" * 100


def book(title: str) -> bytes:
    lines = [
        "\ufeffThe Project Gutenberg eBook, of course",
        f"*** START OF THE PROJECT GUTENBERG EBOOK {title.upper()} ***",
        *[f"{title}, sentence {number}." for number in range(50)],
        f"*** END OF THE PROJECT GUTENBERG EBOOK {title.upper()} ***",
        "Updated editions will replace the previous one.",
    ]
    return "\r\n".join(lines).encode()


PAGES = {
    "/kant.txt": KANT.encode(),
    "/small.txt": b"<html>rate limited</html>",
    "/large.txt": b"x" * (BOUNDS[1] + 1),
    "/latin1.txt": ("Königsberg\n" * 200).encode("latin-1"),
    "/binary.txt": b"PK\0\1" * 500,
    "/one.txt": book("one"),
    "/two.txt": book("two"),
    "/three.txt": book("three"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``PAGES``, and pages that break off or arrive slowly."""

    def do_GET(self) -> None:
        if self.path == "/truncated.txt":
            self.answer(KANT.encode()[:2000], announced=5000)
        elif self.path == "/drip.txt":
            self.answer(b"", announced=SLOW_BYTES)
            self.drip()
        elif self.path == "/drip_header.txt":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
            self.drip()
            self.wfile.write(b"\r\n\r\n" + KANT.encode())
        elif self.path in PAGES:
            self.answer(PAGES[self.path])
        else:
            self.send_error(404)

    def answer(self, body: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        """Send a byte every 20 ms for 30 seconds, so that no single read times out."""
        for _ in range(SLOW_BYTES):
            self.wfile.write(b"x")
            time.sleep(0.02)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client may hang up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        serving.daemon_threads = True
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_first_working_source_is_used(server: str) -> None:
    text, urls = fetch([[f"{server}/kant.txt"], [f"{server}/one.txt"]], BOUNDS)
    assert text == KANT.replace("\r\n", "\n")
    assert urls == [f"{server}/kant.txt"]


def test_books_are_joined_without_licences(server: str) -> None:
    books = [f"{server}/{name}.txt" for name in ("one", "two", "three")]
    text, urls = fetch([[f"{server}/missing.txt"], books], BOUNDS)
    assert text.split("\n\n") == [
        "\n".join(f"{title}, sentence {number}." for number in range(50))
        for title in ("one", "two", "three")
    ]
    assert urls == books


def test_source_with_missing_book_is_skipped(server: str) -> None:
    text, urls = fetch(
        [[f"{server}/one.txt", f"{server}/missing.txt"], [f"{server}/kant.txt"]], BOUNDS
    )
    assert "sentence" not in text and urls == [f"{server}/kant.txt"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("missing", "Not Found"),
        ("small", "25 bytes, where 1000 to 20000 were expected"),
        ("large", "more than 20000 bytes"),
        ("latin1", "invalid start byte"),
        ("binary", "binary"),
        ("truncated", "2000 bytes of the 5000 announced"),
    ],
)
def test_bad_page_is_refused_with_reason(server: str, page: str, reason: str) -> None:
    with pytest.raises(FetchError, match=f"/{page}.txt: {reason}"):
        fetch([[f"{server}/{page}.txt"]], BOUNDS)


@pytest.mark.parametrize("page", ["drip", "drip_header"])
def test_deadline_ends_slow_download(server: str, page: str) -> None:
    with pytest.raises(FetchError, match=f"/{page}.txt"):
        fetch([[f"{server}/{page}.txt"]], BOUNDS, timeout_seconds=0.3)


def test_error_lists_every_failed_source(server: str, closed_url: str) -> None:
    with pytest.raises(
        FetchError, match=rf"{closed_url}/x: .*refused.*; {server}/small\.txt: 25 bytes"
    ):
        fetch([[f"{closed_url}/x"], [f"{server}/small.txt"]], BOUNDS)


def test_kant_is_written_with_prompts_and_source(server: str, tmp_path: Path) -> None:
    said = write_starter(tmp_path, "auto", lambda: fetch([[f"{server}/kant.txt"]], BOUNDS))
    assert said == "corpus: kant"
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == KANT.replace("\r\n", "\n")
    assert json.loads((tmp_path / "prompts.json").read_text()) == PROMPTS["kant"]
    assert json.loads((tmp_path / "source.json").read_text()) == {
        "name": "kant",
        "source": [f"{server}/kant.txt"],
    }


def test_unreachable_kant_corpus_is_an_error(closed_url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the corpus kant could not be fetched"):
        write_starter(tmp_path, "kant", lambda: fetch([[f"{closed_url}/x"]]))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_starter_falls_back_to_python_docs(closed_url: str, tmp_path: Path) -> None:
    """A process with another hash seed in another folder writes the same bytes."""
    said = write_starter(tmp_path, "auto", lambda: fetch([[f"{closed_url}/x"]]))
    assert said.startswith("corpus: python-docs, as kant could not be fetched") and "\n" not in said
    assert json.loads((tmp_path / "source.json").read_text())["name"] == "python-docs"
    assert json.loads((tmp_path / "prompts.json").read_text()) == PROMPTS["python-docs"]
    corpus = (tmp_path / "corpus.txt").read_bytes()
    assert 1_000_000 < len(corpus) < 5_000_000
    assert b"\n\n" in corpus and b"\0" not in corpus

    code = (
        "import hashlib; from kantai.preprocessing.starter_corpus import python_docs; "
        "print(hashlib.sha256(python_docs().encode()).hexdigest())"
    )
    ran = run_python(code, cwd=tmp_path, PYTHONHASHSEED="7")
    assert (ran.stdout, ran.stderr) == (f"{hashlib.sha256(corpus).hexdigest()}\n", "")


@pytest.mark.parametrize("prompt", [prompt for prompts in PROMPTS.values() for prompt in prompts])
def test_prompts_have_one_mask(prompt: str) -> None:
    assert prompt.count("<mask>") == 1
