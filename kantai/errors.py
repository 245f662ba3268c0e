"""Errors that a user can put right, and how a program ends on them: one line, exit code 2."""

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from kantai.output import PlainOutput, plain, redact

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """An error that the user can put right.

    The message is one line: what is wrong, where, and what to do. Secrets in it are redacted, since
    launchers write it into files, too.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def run_command(main: Callable[[], None]) -> None:
    """Run a script's ``main``.

    Bad input and I/O failures end the program with one line on stderr and exit code 2. What is
    printed is redacted and plain.
    """
    sys.excepthook = _print_traceback
    try:
        with contextlib.redirect_stdout(PlainOutput.of(sys.stdout)):
            main()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `script | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        path = getattr(error, "filename", None)
        if _is_full_disk(error):
            _fail(
                f"no space left on {path or 'the device'}: free some and run the same command again"
            )
        if isinstance(error, OSError) and path is not None:
            is_limit = error.errno == errno.EMFILE
            advice = "; raise the limit with ulimit -n" if is_limit else ""
            _fail(f"{error.strerror}: {path}{advice}")
        raise


def _print_traceback(
    kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    """Print a traceback as Python does, redacted."""
    text = "".join(traceback.format_exception(kind, error, frames))
    print(redact(text), end="", file=sys.stderr, flush=True)


def _is_full_disk(error: Exception) -> bool:
    """Whether a disk or a quota is full.

    Libraries written in Rust (tokenizers, safetensors) raise exceptions of their own types. The
    system's error number is only in their text.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    return any(f"(os error {number})" in str(error) for number in _FULL_DISK)


def _fail(message: str) -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        # Bad input fails on every rank alike. Rank 0 speaks first, and the launcher then ends the
        # others before they repeat it. A failure that only this rank sees is still printed.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(3)
    line = plain(redact(" ".join(message.split())))
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
