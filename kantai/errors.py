"""Errors that a user can put right, and how a program ends on them: one line, exit code 2."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable

_NO_SPACE = "no space left on {}: free some and run the same command again"


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a script's ``main``: bad input and I/O failures end it with one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `script | head`: whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(_NO_SPACE.format(error.filename or "the device"))
        if error.filename is None:
            raise
        _fail(f"{error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # tokenizers and safetensors write in Rust, and say only in the text of their own exceptions what the system said.
        if any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            _fail(_NO_SPACE.format("the device"))
        raise


def _fail(message: str) -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        # Bad input fails on every rank alike. Rank 0 speaks first, and the launcher then ends the others
        # before they repeat it; a failure that only this rank sees is still printed.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(3)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
