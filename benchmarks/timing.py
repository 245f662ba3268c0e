"""Time calls on the wall clock."""

import time
from collections.abc import Callable


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def calls_per_second(call: Callable[[], object], seconds: float, warm_up: int = 1) -> float:
    """How often a call can be made in a second, measured for ``seconds`` after some warm-up calls.

    The call waits for its device by itself.
    """
    for _ in range(warm_up):
        call()
    calls = 0
    start = time.perf_counter()
    while calls < 1 or time.perf_counter() < start + seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)
