"""StopSignals to stop or save: signals, files in the run directory, and the end of the job."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from kantai.cluster.environment import allocated_since

EXIT_STOPPED = 75  # EX_TEMPFAIL: all is saved, and the same command goes on
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_remembered: list[signal.Signals] = []  # those that came


class StopSignals:
    """What was asked of a run: by a signal, by a file named STOP or SAVE in its directory, or by the end of its job.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are remembered for the loop to read at the next step boundary; a second one ends the process at
    once, which costs no more than what was not saved.
    """

    def __init__(self, run_dir: Path, *, looks: bool = True) -> None:
        """Listen from now on.

        Args:
            looks: for the files as well, which is for one rank alone: a thousand would ask the file system at every step.
        """
        self.run_dir, self.looks = run_dir, looks
        self.signal: signal.Signals | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self.end_time = float(end) if end.isdigit() else None
        for number in STOP_SIGNALS:
            # nohup says that nobody minds the terminal's end. The others are listened to even where a launcher has them ignored for itself.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)
        _end_at_the_second_signal()

    def to_stop(self, seconds_needed: float) -> str | None:
        """Why this process would stop now, or None.

        Args:
            seconds_needed: to do another step, and to save.
        """
        if self.signal is not None:
            return f"{self.signal.name} came"
        if self.looks and (self.run_dir / "STOP").exists():
            return f"there is a file {self.run_dir / 'STOP'}"
        if self.end_time is not None and time.time() + seconds_needed > self.end_time:
            return f"the job ends in {max(0.0, self.end_time - time.time()):.0f} s"
        return None

    def to_save(self) -> bool:
        """Whether there is a file named SAVE."""
        return self.looks and (self.run_dir / "SAVE").exists()

    def job_hours(self) -> float:
        """From the allocation to its end; infinite outside of a job."""
        return math.inf if self.end_time is None else max(0.1, (self.end_time - allocated_since()) / 3600)

    def answer(self, *, stop: bool) -> None:
        """Remove the files, now that what they ask is being done; for one process alone.

        Args:
            stop: whether the run stops, too; else a STOP that has come since is left for the next step.
        """
        for name in ("SAVE", "STOP") if stop else ("SAVE",):
            (self.run_dir / name).unlink(missing_ok=True)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        _remembered.append(self.signal)


def wait_to_be_ended(seconds: float) -> None:
    """Wait for a launcher's SIGTERM, which may have come already, and end by it without a word."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.SIGTERM in _remembered:
        signal.raise_signal(signal.SIGTERM)
    time.sleep(seconds)


def _end_at_the_second_signal() -> None:
    """Watch from a thread: no handler is run while a rank waits inside PyTorch for another, and that is when people ask twice."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        asked = 0
        while asked < 2:
            number = os.read(reading, 1)[0]
            asked += number in STOP_SIGNALS
        sys.stderr.write("asked to stop again: ending at once\n")
        os._exit(128 + number)

    def leave_the_parent_alone() -> None:  # a loader's process
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=leave_the_parent_alone)
    threading.Thread(target=watch, daemon=True).start()
