"""Progress on the terminal."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar with loss, tokens a second and time left on a terminal; a plain line now and then elsewhere."""

    _SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, first_step: int, max_steps: int, *, show: bool) -> None:
        self._show, self._total = show, max_steps
        self._bar: Any = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._next_line = 0.0

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float) -> None:
        """Show that ``step`` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._show and (time.monotonic() >= self._next_line or step == self._total):
            left = (self._total - step) * seconds_per_step
            print(
                f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{int(left // 60)}:{int(left % 60):02d} left",
                flush=True,
            )
            self._next_line = time.monotonic() + self._SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._show:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
