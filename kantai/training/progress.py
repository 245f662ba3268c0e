"""Progress on the terminal."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar with loss, tokens a second and time left; without a terminal, a line now and then."""

    def __init__(self, first_step: int, max_steps: int, *, show: bool) -> None:
        """Start with ``first_step`` steps done; print nothing unless ``show`` is true."""
        self._show = show
        self._max_steps = max_steps
        self._bar: Any = None
        self._next_line = 0.0
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def show_step(
        self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float
    ) -> None:
        """Show that ``step`` steps are done."""
        if self._bar is not None:
            text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        is_due = time.monotonic() >= self._next_line or step == self._max_steps
        if self._show and is_due:
            left = (self._max_steps - step) * seconds_per_step
            self._print(
                f"step {step}/{self._max_steps}  loss {loss:.3f}  "
                f"{tokens_per_second:,.0f} tokens/s  "
                f"{int(left // 60)}:{int(left % 60):02d} left"
            )
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._show:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader of the output is gone; the run goes on
            self._show = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def finish(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
