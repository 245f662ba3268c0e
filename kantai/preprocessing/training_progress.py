"""How long tokenizer training still takes, on a terminal.

While the library trains, it calls no code of ours. It can write its progress to stderr as lines of
JSON, which are caught there and shown as a bar.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

_STDERR = 2


def is_terminal() -> bool:
    """Whether somebody sees a bar."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def bars_of_library() -> Iterator[None]:
    """Show what the library writes to stderr meanwhile as bars with the time that is left.

    What Python writes to ``sys.stderr`` reaches the terminal as before.
    """
    terminal = os.dup(_STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)
    encoding = sys.stderr.encoding
    with os.fdopen(terminal, "w", 1, encoding, "backslashreplace") as screen:
        thread = threading.Thread(target=_show, args=(reading, screen), daemon=True)
        thread.start()
        try:
            with contextlib.redirect_stderr(screen):
                yield
        finally:
            os.dup2(terminal, _STDERR)  # nobody writes to the pipe any more, which ends the thread
            thread.join()


def _show(reading: int, screen: TextIO) -> None:
    bars: dict[str, tqdm[Any]] = {}
    with os.fdopen(reading, errors="replace") as lines:
        for line in lines:
            try:
                progress = json.loads(line)
                stage = str(progress["stage"])
                current = int(progress["current"])
                total = int(progress["total"])
            except (ValueError, KeyError, TypeError):
                screen.write(line)  # an error of the library's
                continue
            if stage not in bars:
                for bar in bars.values():
                    bar.close()
                bars[stage] = tqdm(total=total, desc=stage.lower(), file=screen, leave=False)
            bars[stage].total = total
            bars[stage].update(current - bars[stage].n)
        for bar in bars.values():
            bar.close()
