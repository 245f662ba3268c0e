"""Why something on a network cannot be reached, in words; and how long to wait for it."""

import socket
import ssl
from collections.abc import Iterator
from typing import Any

from kantai.errors import UserError

STALL_SECONDS = 60.0
_MISSING = (404, 410)
_STATUSES = {
    401: "it asks for a password or token (401)",
    403: "access is denied (403): see whether it needs credentials, or whether the name is right",
    404: "there is no such file (404)",
    407: "the proxy asks for a password (407)",
    410: "it is gone for good (410)",
    429: "the server asks to be asked less often (429): try again later",
}
_KINDS: dict[type[BaseException], str] = {
    socket.gaierror: "no such host is known: see whether the name is right, and whether this "
    "machine has a network",
    ConnectionRefusedError: "nothing listens there (connection refused): see whether host and port "
    "are right",
    TimeoutError: "no answer within {:g} seconds",
}


def reason(error: BaseException) -> str:
    """Say why a transfer failed; drivers hide the cause behind errors of their own."""
    status = _status(error)
    if status >= 500:
        return f"the server fails ({status}): try again later"
    if status:
        return _STATUSES.get(status, f"the server refuses it ({status})")
    for cause in _causes(error):
        words = _in_words(cause)
        if words:
            return words
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error  # fsspec's says no more than the URL
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(path: str, position: int, error: BaseException) -> UserError:
    """Return the error for a file that cannot be read to its end."""
    return UserError(
        f"{path} cannot be read beyond byte {position} of its text, "
        f"it is damaged, cut off or out of reach: {reason(error)}"
    )


def _in_words(cause: BaseException) -> str | None:
    if isinstance(cause, ssl.SSLError):
        # Not aiohttp's errors of this kind, which lack what Python's say, and stand before them.
        message = getattr(cause, "verify_message", "")
        if message:
            return f"its certificate is not trusted: {message}"
        fault = getattr(cause, "reason", "")
        return fault and f"TLS fails ({fault}): see whether it is http:// and not https://"
    for kind, words in _KINDS.items():
        if isinstance(cause, kind):
            return words.format(STALL_SECONDS)
    return None


def is_missing(error: BaseException) -> bool:
    """Whether an error says that a file does not exist, and no more than that."""
    if not isinstance(error, FileNotFoundError):
        return False
    status = _status(error)
    # fsspec's HTTP says the same of a server that is out of reach.
    causes = list(_causes(error))[1:]
    out_of_reach = any(type(cause).__module__.startswith("aiohttp") for cause in causes)
    return status in _MISSING or (not status and not out_of_reach)


def http_options(url: str, stall_seconds: float) -> dict[str, Any]:
    """Options of the file system of a URL: of ``http``, its timeouts."""
    if not url.lower().startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout

    # By default aiohttp ends every transfer after five minutes, however well it goes.
    timeout = ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    return {"timeout": timeout}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int:
    """HTTP's status code, which aiohttp's errors have; 0 without one."""
    found = (getattr(cause, "status", None) for cause in _causes(error))
    return next((status for status in found if isinstance(status, int) and status >= 400), 0)
