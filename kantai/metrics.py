"""What happened? One flat record an update, in ``metrics.jsonl`` and TensorBoard, with slash names."""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

_RATE_WINDOW_UPDATES = 50


class Metrics:
    """The record of a run, kept by rank 0. A resumed run goes on after its last checkpoint: what was logged later is dropped."""

    def __init__(self, run_dir: Path, first_update: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._drop_from(first_update)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_update, flush_secs=30)

    def write(self, update: int, record: Mapping[str, float]) -> None:
        """Add the record of an update, counted from 1."""
        self._file.write(json.dumps({"update": update, "time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, update)

    def write_text(self, update: int, name: str, text: str) -> None:
        """Add a text (Markdown) to TensorBoard."""
        self._tensorboard.add_text(name, text, update)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._tensorboard.close()

    def _drop_from(self, first_update: int) -> None:
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _update_of(line) < first_update]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._path)


class Speed:
    """Tokens a second and model FLOPs utilisation over the last updates. Pauses (evaluation, saving) do not count."""

    def __init__(self, machine_flops_per_second: float) -> None:
        self._machine = machine_flops_per_second
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RATE_WINDOW_UPDATES)

    def add(self, seconds: float, tokens: int, flops: int) -> None:
        """Add an update of all ranks."""
        self._recent.append((seconds, tokens, flops))

    @property
    def seconds_per_update(self) -> float:
        """Mean of the last updates."""
        return sum(seconds for seconds, _, _ in self._recent) / max(1, len(self._recent))

    def record(self) -> dict[str, float]:
        """``mfu`` is the share of the measured rate of this machine's matrix products, not of a data sheet's."""
        seconds = sum(seconds for seconds, _, _ in self._recent) or math.inf
        return {
            "speed/tokens_per_second": sum(tokens for _, tokens, _ in self._recent) / seconds,
            "speed/mfu": sum(flops for _, _, flops in self._recent) / seconds / self._machine,
        }


class Progress:
    """A bar with loss, tokens a second and time left on a terminal; a plain line now and then elsewhere."""

    _SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, first_update: int, total_updates: int, *, show: bool) -> None:
        self._show, self._total = show, total_updates
        self._bar: Any = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=total_updates, initial=first_update, unit="update", dynamic_ncols=True, file=sys.stderr)
        self._next_line = 0.0

    def update(self, update: int, loss: float, tokens_per_second: float, seconds_per_update: float) -> None:
        """Show that ``update`` updates are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(update - self._bar.n)
        elif self._show and (time.monotonic() >= self._next_line or update == self._total):
            left = (self._total - update) * seconds_per_update
            print(
                f"update {update}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
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


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if os.uname().sysname == "Darwin" else peak / 2**20  # bytes there, KiB on Linux


def _update_of(line: str) -> float:
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill
