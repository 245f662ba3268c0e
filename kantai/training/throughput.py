"""Tokens a second, model FLOPs utilisation, goodput and memory."""

import json
import math
import os
import resource
from collections import deque
from pathlib import Path

from kantai.storage.json_lines import read_json_lines
from kantai.training.clock import WallClock

_WINDOW_STEPS = 50


class Throughput:
    """Rates over the last 50 steps. Pauses, as for evaluating or saving, do not count."""

    def __init__(self, machine_flops_per_second: float) -> None:
        """Compare with a measured rate of matrix products, over all ranks."""
        self._machine = machine_flops_per_second
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW_STEPS)

    def observe(self, seconds: float, tokens: int, flops: int) -> None:
        """Take note of a step of all ranks."""
        self._recent.append((seconds, tokens, flops))

    @property
    def seconds_per_step(self) -> float:
        """Mean of the last steps."""
        return sum(seconds for seconds, _, _ in self._recent) / max(1, len(self._recent))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are no padding."""
        return sum(tokens for _, tokens, _ in self._recent) / self._seconds

    @property
    def mfu(self) -> float:
        """Share of the measured rate of this machine's matrix products, not of a data sheet's."""
        return sum(flops for _, _, flops in self._recent) / self._seconds / self._machine

    @property
    def _seconds(self) -> float:
        return sum(seconds for seconds, _, _ in self._recent) or math.inf


class Goodput:
    """Share of the allocated time that went into steps that the run kept, over all its starts.

    The rest is starting, compiling, saving, evaluating, and steps that were lost and done again.
    ``starts.jsonl`` says when each start got its nodes, and for how long nodes had been allocated
    to the run before. A start counts up to its last record.
    """

    def __init__(
        self,
        path: Path,
        allocated_since: float,
        clock: WallClock,
        *,
        last_time: float,
        useful_seconds: float,
    ) -> None:
        """Add this start to the file.

        Args:
            allocated_since: when this start got its nodes, in Unix time.
            last_time: of the last record of earlier starts.
            useful_seconds: of steps that are not done again.
        """
        self.useful_seconds = useful_seconds
        self._clock = clock
        self._seconds_before = 0.0
        self._since = allocated_since
        starts = list(read_json_lines(path)) if path.exists() else []
        if starts:
            began = starts[-1].get("began")
            before = starts[-1].get("seconds_before")
            if isinstance(began, float) and isinstance(before, float):
                ended = max(began, last_time)
                self._seconds_before = before + ended - began
                self._since = max(ended, allocated_since)
        start = {"began": self._since, "seconds_before": self._seconds_before}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")

    def after_step(self, useful_seconds: float) -> None:
        """Take note of a step; a skipped step has no useful seconds."""
        self.useful_seconds += useful_seconds

    def share(self) -> float:
        """The goodput now."""
        allocated = self._seconds_before + self._clock.now() - self._since
        return self.useful_seconds / max(allocated, self.useful_seconds)


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_darwin = os.uname().sysname == "Darwin"
    return peak / 2**30 if is_darwin else peak / 2**20  # bytes there, KiB on Linux
