"""The time of a run's records."""

import time


class WallClock:
    """Unix time that never goes back within a run, whatever this node's clock says.

    TensorBoard hides what came before a time that goes back.
    """

    def __init__(self, at_least: float) -> None:
        """Go on from the run's last record, at the speed of this node's clock."""
        self._ahead = max(0.0, at_least - time.time())
        self._last = at_least

    def now(self) -> float:
        """Seconds, to the millisecond."""
        self._last = max(self._last, round(time.time() + self._ahead, 3))
        return self._last
