"""Which text, for those who bring none? Kant in English from the web, or English prose that every Python carries."""

import ast
import functools
import http.client
import json
import sys
import sysconfig
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from kantai.errors import UserError

# The corpus of the well-known tutorial, then the Project Gutenberg books that it was made of.
KANT_SOURCES: tuple[tuple[str, ...], ...] = (
    ("https://raw.githubusercontent.com/Denis2054/Transformers-for-NLP-2nd-Edition/master/Chapter04/kant.txt",),
    tuple(f"https://www.gutenberg.org/cache/epub/{book}/pg{book}.txt" for book in (4280, 5682, 5683)),
)
KANT_BYTES = (1_000_000, 20_000_000)  # anything outside is an error page or a wrong file
PROMPTS = {
    "kant": ["Human thinking involves human <mask>.", "The critique of pure <mask>.", "It is a priori <mask>."],
    "python-docs": ["Return the <mask> of the object.", "If the argument is not <mask>, an exception is raised.", "A list of <mask>."],
}


class FetchError(Exception):
    """No source gave the text; the message says why, source by source."""


def fetch(
    sources: Sequence[Sequence[str]] = KANT_SOURCES, bounds: tuple[int, int] = KANT_BYTES, timeout_seconds: float = 30
) -> tuple[str, list[str]]:
    """Download a text: the first source whose every URL answers in time with UTF-8 of a sensible size.

    Args:
        sources: alternatives; the URLs of one are joined in order.
        bounds: least and most bytes the whole text may have.
        timeout_seconds: for one source, from the first request to the last byte.

    Returns:
        The text and the URLs it came from.

    Raises:
        FetchError: every source failed.
    """
    failures = []
    for urls in sources:
        try:
            text = _within(timeout_seconds, functools.partial(_join, urls, bounds[1], timeout_seconds))
            size = len(text.encode())
            if not bounds[0] <= size <= bounds[1]:
                raise ValueError(f"{size} bytes, where {bounds[0]} to {bounds[1]} were expected")
            return text, list(urls)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{urls[0]}: {getattr(error, 'reason', None) or error}")
    raise FetchError("; ".join(failures))


def python_docs() -> str:
    """English prose out of Python's own standard library: the language reference's topics, then all docstrings.

    Source files are parsed, never imported, in the order of their names, so one Python version gives one text (about 2 MB).
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    if not (library / "ast.py").is_file():
        raise UserError(f"{library} has no Python sources to read docstrings from: give a text of your own with --corpus FILE")
    texts = [topics[name] for name in sorted(topics)]
    for path in sorted(library.rglob("*.py")):
        # Neither what users installed nor the tests, whose docstrings are few and whose files are many.
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}.isdisjoint(path.relative_to(library).parts):
            texts += _docstrings(path)
    return "\n\n".join(text.strip() for text in texts) + "\n"


def write_starter(folder: Path, name: str, fetch_kant: Callable[[], tuple[str, list[str]]] = fetch) -> str:
    """Write ``corpus.txt``, ``prompts.json`` and ``source.json`` into a folder.

    Args:
        name: ``kant``, ``python-docs``, or ``auto``: Kant where there is a network, else the other.

    Returns:
        One line that says what was written and why.

    Raises:
        UserError: ``kant`` was asked for and no source gave it.
    """
    said = "corpus: python-docs"
    text, source = "", [f"the standard library of Python {sys.version.split()[0]}"]
    if name in ("kant", "auto"):
        try:
            text, source = fetch_kant()
            name, said = "kant", "corpus: kant"
        except FetchError as error:
            if name == "kant":
                raise UserError(f"the corpus kant could not be fetched: {error}") from None
            said = f"corpus: python-docs, as kant could not be fetched ({error})"
    if not text:
        name, text = "python-docs", python_docs()
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS[name], indent=1), encoding="utf-8")
    (folder / "source.json").write_text(json.dumps({"name": name, "source": source}, indent=1), encoding="utf-8")
    return said


def _within(seconds: float, call: Callable[[], str]) -> str:
    """What a call returns, or TimeoutError; a socket's own time-out is for one operation, and a server may drip for ever."""
    results: list[str | Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result = results[0] if results else TimeoutError(f"no whole answer within {seconds:g} seconds")
    if isinstance(result, Exception):
        raise result
    return result


def _join(urls: Sequence[str], most_bytes: int, timeout_seconds: float) -> str:
    return "\n\n".join(_without_licence(_download(url, most_bytes, timeout_seconds)) for url in urls)


def _download(url: str, most_bytes: int, timeout_seconds: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as response:
            body: bytes = response.read(most_bytes + 1)
            announced = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(error.reason) from None
    if len(body) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    if announced is not None and len(body) < int(announced):
        raise ValueError(f"{len(body)} bytes of the {announced} announced")
    if b"\0" in body:
        raise ValueError("binary")
    return body.decode("utf-8-sig").replace("\r\n", "\n")


def _without_licence(text: str) -> str:
    """A Project Gutenberg book without the notes before and after it; other texts as they are."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("*** START OF")]
    ends = [i for i, line in enumerate(lines) if line.startswith("*** END OF")]
    return "\n".join(lines[starts[0] + 1 : ends[0]]) if len(starts) == 1 and len(ends) == 1 else text


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # deliberate bad examples among the sources
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text.split()) >= 5]
