"""What leaves the process: no secrets, and nothing that a terminal would obey.

URLs carry passwords and tokens, and corpora and file names carry escape sequences. Text is redacted
where it is written for good (manifests, configs, model cards, error messages), and both redacted
and made plain where it is printed.
"""

import re
import unicodedata
from typing import Any, TextIO, cast

REDACTED = "REDACTED"
# Lengths are bounded, so that the time for a long text grows with its length alone.
_SECRET_NAME = (
    r"(?:[\w.-]{0,40}(?:token|signature|secret|passw(?:or)?d|credential|api[_-]?key|access[_-]?key|"
    r"account[_-]?key|connection[_-]?string)[\w.-]{0,40}|sig|key|pwd|auth|authorization|jwt)"
)
_SECRETS = (
    # scheme://user:password@host; and https://token@host, where other schemes have a user, or a
    # container before the @. A password may hold a slash, as every second key of AWS does.
    (
        re.compile(
            r"\b([a-z][\w+.-]{0,30}://[^\s/:@'\"?#]{0,200}):(?!\d+/)[^\s'\"]{0,1000}@", re.I
        ),
        rf"\1:{REDACTED}@",
    ),
    (re.compile(r"\b(https?://)[^\s/:@'\"?#]{1,1000}@", re.I), rf"\1{REDACTED}@"),
    (re.compile(rf"([?&;#]{_SECRET_NAME}=)[^\s&;#'\"]+", re.I), rf"\1{REDACTED}"),
    # Options of a file system, as drivers print them: 'secret': 'x' or secret=x. Prose has colons
    # without quotation marks.
    (
        re.compile(
            r"""((?:\b|_)(?:secret(?:_?access_?key)?|password|passwd|(?:access|session|sas)_?token|
            (?:api|account|access|secret)_?key(?:_?id)?|connection_?string)
            (?:["']\s*:\s*["']|=["']?))[^\s,;&"'})]+""",
            re.I | re.X,
        ),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(r"""(authorization["']?\s*[:=]\s*["']?\w+\s+)[^\s"']+""", re.I),
        rf"\1{REDACTED}",
    ),
    # Keys that are known by their shape: of AWS, the Hugging Face Hub and GitHub.
    (re.compile(r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_\w{20,}|gh[pousr]_\w{20,})"), REDACTED),
)
# Cc: control characters; Cf: among others, those that reverse what is shown; Cs: halves of pairs,
# which no terminal can print; Zl, Zp: line ends.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Cf: joiners of letters, which several languages and emoji need.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
_MAY_BE_OBEYED = re.compile(r"[^\n\t -~]")


def redact(text: str) -> str:
    """A text with ``REDACTED`` for passwords, tokens and keys."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redact_all(value: Any) -> Any:
    """A tree of plain values with all its texts redacted; the names of its entries stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def plain(text: str) -> str:
    """A text with escapes, such as ``\\x1b``, for characters that a terminal would obey."""
    return _MAY_BE_OBEYED.sub(_plain_character, text)


def _plain_character(match: re.Match[str]) -> str:
    character = match[0]
    if character in _KEPT or unicodedata.category(character) not in _OBEYED:
        return character
    return character.encode("unicode_escape").decode()


class PlainOutput:
    """A stream that prints only what is redacted and plain; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def of(cls, stream: TextIO) -> TextIO:
        """Wrap a stream, once."""
        return stream if isinstance(stream, cls) else cast(TextIO, cls(stream))

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        self._stream.write(plain(redact(text)))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
