"""Tokens a second, model FLOPs utilisation and goodput."""

import json
import math
import os
import resource
import time
from collections import deque
from pathlib import Path
from typing import Any

from kantai.storage.json_lines import read_json_lines

_RATE_WINDOW_STEPS = 50


class Goodput:
    """Share of the time in which nodes were allocated to a run that went into steps it kept, over all its starts.

    The rest is starting, compiling, saving, evaluating, and steps that were lost and done again. ``starts.jsonl`` has when each start
    got its nodes, and for how long they had been allocated before; a start counts up to its last record.
    """

    def __init__(self, path: Path, allocated_since: float, records: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
        earlier = [(line.get("began"), line.get("seconds_before")) for line in read_json_lines(path)] if path.exists() else []
        self._before, self._since = 0.0, allocated_since
        for began, before in earlier[-1:]:
            if isinstance(began, float) and isinstance(before, float):
                ended = max([began, *(record["time"] for record in records)])
                self._before, self._since = before + ended - began, max(ended, allocated_since)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"began": self._since, "seconds_before": self._before}) + "\n")
        times = (record.get("speed/step_seconds") for record in kept if not record.get("train/skipped"))
        self._useful = sum(seconds for seconds in times if isinstance(seconds, float))

    def add(self, seconds: float) -> float:
        """Count a step that was not skipped, and return the goodput."""
        self._useful += seconds
        return self._useful / max(self._before + time.time() - self._since, self._useful)


class Speed:
    """Tokens a second and model FLOPs utilisation over the last steps. Pauses (evaluation, saving) do not count."""

    def __init__(self, machine_flops_per_second: float) -> None:
        self._machine = machine_flops_per_second
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RATE_WINDOW_STEPS)

    def add(self, seconds: float, tokens: int, flops: int) -> None:
        """Add a step of all ranks."""
        self._recent.append((seconds, tokens, flops))

    @property
    def seconds_per_step(self) -> float:
        """Mean of the last steps."""
        return sum(seconds for seconds, _, _ in self._recent) / max(1, len(self._recent))

    def as_metrics(self) -> dict[str, float]:
        """``mfu`` is the share of the measured rate of this machine's matrix products, not of a data sheet's."""
        seconds = sum(seconds for seconds, _, _ in self._recent) or math.inf
        return {
            "speed/tokens_per_second": sum(tokens for _, tokens, _ in self._recent) / seconds,
            "speed/mfu": sum(flops for _, _, flops in self._recent) / seconds / self._machine,
        }


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if os.uname().sysname == "Darwin" else peak / 2**20  # bytes there, KiB on Linux
