"""Data that a run is not to see again after bad numbers."""

import json
from pathlib import Path

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError

SKIPPED_DATA_FILE = "skipped_data.jsonl"


class SkippedData:
    """The windows of data that a run skips: ``skipped_data.jsonl`` in its directory.

    With the file, what step *t* is shown stays a function of config, data, seed and *t*.

    Attributes:
        windows: (step from which on it holds, first step whose data is skipped, the one behind the
            last).
    """

    def __init__(self, path: Path, windows: list[tuple[int, int, int]]) -> None:
        self.path = path
        self.windows = windows

    @classmethod
    def of(cls, run_dir: Path) -> "SkippedData":
        """The skipped data of a run directory.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / SKIPPED_DATA_FILE
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            records = [json.loads(line) for line in lines]
            windows = [(int(r["from_step"]), int(r["first"]), int(r["stop"])) for r in records]
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(
                f"{path} is damaged: it says which data the run skips; bring it back from a copy"
            ) from None
        return cls(path, windows)

    def data_step(self, step: int) -> int:
        """The step whose data, by the config, a step is shown."""
        skipped = (stop - first for start, first, stop in self.windows if start <= step)
        return step + sum(skipped)

    def before(self, step: int) -> list[tuple[int, int, int]]:
        """The windows that decided what the steps before one were shown."""
        return [window for window in self.windows if window[0] < step]

    def first_to_skip(self, bad: int) -> int:
        """The first step whose data is to be skipped when steps from ``bad`` on are bad.

        It is the step before, which may have caused the bad ones. But where an earlier window
        holds from ``bad`` on, it is ``bad``: a run that finds nothing but bad steps must not go
        back further every time.
        """
        holds_from = [start for start, _, _ in self.windows]
        return bad if bad in holds_from else max(0, bad - 1)

    def skip(self, first: int, done: int, store: CheckpointStore) -> None:
        """Skip, from step ``first`` on, the data of steps up to ``done``; for rank 0.

        Raises:
            UserError: a later start of the run has superseded this one.
        """
        window = (first, self.data_step(first), self.data_step(done - 1) + 1)
        # What was skipped after that step is within this window.
        self.windows = [*(earlier for earlier in self.windows if earlier[0] <= first), window]
        records = [
            {"from_step": start, "first": first, "stop": stop}
            for start, first, stop in self.windows
        ]
        with store.replaced(self.path) as partial:
            lines = (json.dumps(record) + "\n" for record in records)
            partial.write_text("".join(lines), encoding="utf-8")
