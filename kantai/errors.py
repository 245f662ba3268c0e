"""How a program ends on errors: one line, and an exit code that says whether to try again.

The code is 2 if a user has to put something right first, and 74 if a disk or a server failed in a
way that may pass. The batch scripts of SLURM requeue a job at any code but 2.
"""

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from kantai.output import PlainOutput, plain, redact

EXIT_USER_ERROR = 2
EXIT_PASSING_ERROR = os.EX_IOERR  # 74
PASSING_ERRORS = (  # of disks, file servers and their clients, and of a node with much to do
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENFILE,
    errno.ENOLCK,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
)
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

    Bad input ends the program with one line on stderr and exit code 2, and an I/O error that may
    pass with one line and exit code 74. What is printed is redacted and plain.
    """
    sys.excepthook = _print_traceback
    try:
        with contextlib.redirect_stdout(PlainOutput.of(sys.stdout)):
            main()
    except UserError as error:
        _fail(str(error), EXIT_PASSING_ERROR if _may_pass(error) else EXIT_USER_ERROR)
    except BrokenPipeError:  # `script | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        path = getattr(error, "filename", None)
        if _is_one_of(_FULL_DISK, error):
            _fail(
                f"no space left on {path or 'the device'}: free some and run the same command again"
            )
        if _is_one_of(PASSING_ERRORS, error):
            where = f"{error.strerror}: {path}" if isinstance(error, OSError) and path else error
            _fail(f"{where}; this may pass: run the same command again", EXIT_PASSING_ERROR)
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


def _is_one_of(numbers: tuple[int, ...], error: BaseException) -> bool:
    """Whether an error has one of the system's error numbers.

    Libraries written in Rust (tokenizers, safetensors) raise exceptions of their own types. The
    system's error number is only in their text.
    """
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


def _may_pass(error: BaseException | None) -> bool:
    """Whether a UserError was raised because of an error of the system that may pass."""
    while error is not None:
        if _is_one_of(PASSING_ERRORS, error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, code: int = EXIT_USER_ERROR) -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        # Bad input fails on every rank alike. Rank 0 speaks first, and the launcher then ends the
        # others before they repeat it. A failure that only this rank sees is still printed.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(3)
    line = plain(redact(" ".join(message.split())))
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
