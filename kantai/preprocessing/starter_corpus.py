"""Starter corpora: Kant in English from the web, or English prose from Python's own library."""

import ast
import http.client
import json
import multiprocessing
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from kantai.errors import UserError

# The corpus of a well-known tutorial, then the Project Gutenberg books that it was made from.
KANT_SOURCES: tuple[tuple[str, ...], ...] = (
    (
        "https://raw.githubusercontent.com/Denis2054/Transformers-for-NLP-2nd-Edition/"
        "master/Chapter04/kant.txt",
    ),
    tuple(
        f"https://www.gutenberg.org/cache/epub/{book}/pg{book}.txt" for book in (4280, 5682, 5683)
    ),
)
KANT_BYTES = (1_000_000, 20_000_000)  # outside these bounds it is an error page or a wrong file
PROMPTS = {
    "kant": [
        "Human thinking involves human <mask>.",
        "The critique of pure <mask>.",
        "It is a priori <mask>.",
    ],
    "python-docs": [
        "Return the <mask> of the object.",
        "If the argument is not <mask>, an exception is raised.",
        "A list of <mask>.",
    ],
}


class FetchError(Exception):
    """No source gave the text; the message states the reason for each source."""


def fetch(
    sources: Sequence[Sequence[str]] = KANT_SOURCES,
    bounds: tuple[int, int] = KANT_BYTES,
    timeout_seconds: float = 30,
) -> tuple[str, list[str]]:
    """Download a text from the first source that gives UTF-8 of a sensible size in time.

    Args:
        sources: alternatives; the texts at the URLs of one source are joined in order.
        bounds: minimum and maximum size of the whole text in bytes.
        timeout_seconds: for one source, from the first request to the last byte.

    Returns:
        The text and the URLs it came from.

    Raises:
        FetchError: every source failed.
    """
    failures = []
    for urls in sources:
        try:
            return _fetch_source(urls, bounds, timeout_seconds), list(urls)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{urls[0]}: {getattr(error, 'reason', None) or error}")
    raise FetchError("; ".join(failures))


def python_docs() -> str:
    """Return English prose from Python's library: the language reference, then all docstrings.

    Source files are parsed in the order of their names and never imported, so one Python version
    gives one text (about 2 MB).
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    if not (library / "ast.py").is_file():
        raise UserError(
            f"{library} has no Python sources to read docstrings from: "
            "give a text of your own with --corpus FILE"
        )
    texts = [topics[name] for name in sorted(topics)]
    # Packages that a user installed vary, and tests have few docstrings in many files.
    excluded = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if excluded.isdisjoint(path.relative_to(library).parts):
            texts += _docstrings(path)
    return "\n\n".join(text.strip() for text in texts) + "\n"


def write_starter(
    folder: Path, name: str, fetch_kant: Callable[[], tuple[str, list[str]]] = fetch
) -> str:
    """Write ``corpus.txt``, ``prompts.json`` and ``source.json``; return a line that says which.

    Args:
        name: ``kant``, ``python-docs``, or ``auto``: kant if it can be fetched, else python-docs.

    Raises:
        UserError: ``kant`` was asked for and no source gave it.
    """
    message = "corpus: python-docs"
    if name != "python-docs":
        try:
            text, source = fetch_kant()
            _write_corpus(folder, "kant", text, source)
            return "corpus: kant"
        except FetchError as error:
            if name == "kant":
                raise UserError(f"the corpus kant could not be fetched: {error}") from None
            message = f"corpus: python-docs, as kant could not be fetched ({error})"
    source = [f"the standard library of Python {sys.version.split()[0]}"]
    _write_corpus(folder, "python-docs", python_docs(), source)
    return message


def _write_corpus(folder: Path, name: str, text: str, source: list[str]) -> None:
    files = {
        "corpus.txt": text,
        "prompts.json": json.dumps(PROMPTS[name], indent=1),
        "source.json": json.dumps({"name": name, "source": source}, indent=1),
    }
    for file_name, content in files.items():
        (folder / file_name).write_text(content, encoding="utf-8")


def _fetch_source(urls: Sequence[str], bounds: tuple[int, int], timeout_seconds: float) -> str:
    def download_all() -> str:
        texts = (_download(url, bounds[1], timeout_seconds) for url in urls)
        return "\n\n".join(_without_licence(text) for text in texts)

    # A socket's own time-out is for one operation, and a server may send a byte a second for ever.
    # The pool's thread is a daemon: a download that goes on does not keep the program from ending.
    with ThreadPool(1) as pool:
        try:
            text = pool.apply_async(download_all).get(timeout_seconds)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"no whole answer within {timeout_seconds:g} seconds") from None
    size = len(text.encode())
    if not bounds[0] <= size <= bounds[1]:
        raise ValueError(f"{size} bytes, where {bounds[0]} to {bounds[1]} were expected")
    return text


def _download(url: str, max_bytes: int, timeout_seconds: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as response:
            body: bytes = response.read(max_bytes + 1)
            announced = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(error.reason) from None
    if len(body) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    if announced is not None and len(body) < int(announced):
        raise ValueError(f"{len(body)} bytes of the {announced} announced")
    if b"\0" in body:
        raise ValueError("binary")
    return body.decode("utf-8-sig").replace("\r\n", "\n")


def _without_licence(text: str) -> str:
    """Remove the notes before and after a Project Gutenberg book; leave other texts alone."""
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith("*** START OF")]
    ends = [number for number, line in enumerate(lines) if line.startswith("*** END OF")]
    if len(starts) != 1 or len(ends) != 1:
        return text
    return "\n".join(lines[starts[0] + 1 : ends[0]])


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # some sources are bad examples on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text.split()) >= 5]
