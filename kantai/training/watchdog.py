"""A watchdog against hangs: it dumps the stacks of all threads and ends the process."""

import faulthandler
import sys
from pathlib import Path
from typing import TextIO


class Watchdog:
    """Ends this process when nothing has kicked the watchdog for some time.

    It writes the stacks of all threads first, so that one can see where each rank was. The process
    ends by an exit code that makes a launcher end the other ranks, and SLURM requeue the job.
    """

    def __init__(self, hang_seconds: float) -> None:
        """Start; stacks go to the standard error until :meth:`dump_to` names a file."""
        self._hang_seconds = hang_seconds
        self._path: Path | None = None
        self._file: TextIO = sys.stderr
        self.kick()

    def dump_to(self, path: Path) -> bool:
        """Write stacks to a file from now on; whether an earlier start has left some there."""
        self._path = path
        self._file = path.open("a")
        self.kick()
        return self._file.tell() > 0

    def kick(self) -> None:
        """Reset the watchdog, which otherwise dumps all stacks and exits."""
        faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._file)

    def stop(self) -> None:
        """Watch no longer, and remove the file."""
        faulthandler.cancel_dump_traceback_later()
        if self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
