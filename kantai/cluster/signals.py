"""Requests to stop or save: signals, files in the run directory, and the end of the job."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: all is saved, and the same command goes on
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"
_received: list[signal.Signals] = []


def exit_code_when_stopped() -> int:
    """The exit code of a run that was asked to stop and has saved all.

    Under ``torchrun --max-restarts`` it is 0: any other code starts the ranks again.
    """
    restarts = os.environ.get(_RESTARTS, "0")
    return 0 if restarts not in ("", "0") else EXIT_STOPPED


class StopSignals:
    """Requests by a signal, by a file STOP or SAVE in the run directory, or by the end of the job.

    The loop reads SIGTERM, SIGINT, SIGUSR1 and SIGHUP at the next step boundary. A second signal
    ends the process at once, which costs no more than the steps since the last checkpoint.
    """

    def __init__(self, run_dir: Path, *, watch_files: bool = True) -> None:
        """Listen from now on.

        Args:
            watch_files: look for these files. One rank does so: a thousand would ask the file
                system at every step.
        """
        self.run_dir = run_dir
        self.watch_files = watch_files
        self.signal: signal.Signals | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self.end_time = float(end) if end.isdigit() else None
        for number in STOP_SIGNALS:
            # nohup ignores SIGHUP on purpose: the terminal's end is not to stop the run. The other
            # signals count even if a launcher ignores them for itself.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        _exit_at_second_signal()

    def stop_reason(self, seconds_needed: float) -> str | None:
        """Why this process would stop now, if another step and a checkpoint take so long."""
        if self.signal is not None:
            return f"{self.signal.name} came"
        if self.watch_files and (self.run_dir / "STOP").exists():
            return f"there is a file {self.run_dir / 'STOP'}"
        if self.end_time is not None and time.time() + seconds_needed > self.end_time:
            return f"the job ends in {max(0.0, self.end_time - time.time()):.0f} s"
        return None

    def save_requested(self) -> bool:
        """Whether there is a file named SAVE."""
        return self.watch_files and (self.run_dir / "SAVE").exists()

    def acknowledge(self, *, stop: bool) -> None:
        """Remove the files whose request is being met; for one process alone.

        Unless the run stops, a STOP that has just appeared is left for the next step.
        """
        for name in ("SAVE", "STOP") if stop else ("SAVE",):
            (self.run_dir / name).unlink(missing_ok=True)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        _received.append(self.signal)


def wait_to_be_ended(seconds: float) -> None:
    """Wait for a launcher's SIGTERM, which may have come already, and end by it silently."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.SIGTERM in _received:
        signal.raise_signal(signal.SIGTERM)
    time.sleep(seconds)


def _exit_at_second_signal() -> None:
    """Watch for signals from a thread.

    Python runs no handler while a rank waits for others inside PyTorch, and that is when people
    send a second signal.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        received = 0
        while received < 2:
            number = os.read(reading, 1)[0]
            received += number in STOP_SIGNALS
        sys.stderr.write("asked to stop again: ending at once\n")
        os._exit(128 + number)

    def do_not_wake_the_parent() -> None:  # in a forked data loader worker
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=do_not_wake_the_parent)
    threading.Thread(target=watch, daemon=True).start()
