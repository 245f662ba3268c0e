"""Data that a run was not to see again after bad numbers."""

import json
from pathlib import Path

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError


class SkippedData:
    """The data that a run was not to see again after bad numbers: ``skipped_data.jsonl`` in its directory.

    With it, what step *t* is shown stays a function of config, data, seed and *t*.

    Attributes:
        windows: (step from which on it holds, first step whose data was skipped, and the one behind the last).
    """

    def __init__(self, path: Path, windows: list[tuple[int, int, int]]) -> None:
        self.path, self.windows = path, windows

    @classmethod
    def of(cls, run_dir: Path) -> "SkippedData":
        """Of a run directory.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / "skipped_data.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            records = [json.loads(line) for line in lines]
            return cls(
                path,
                [(int(each["from_step"]), int(each["first"]), int(each["stop"])) for each in records],
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(f"{path} is damaged: it says which data the run skips; bring it back from a copy") from None

    def data_step(self, step: int) -> int:
        """The step whose data a step is shown."""
        return step + sum(stop - first for from_step, first, stop in self.windows if from_step <= step)

    def skip(self, back: int, done: int, store: CheckpointStore) -> None:
        """From step ``back`` on, skip the data that steps up to ``done`` were shown; for the latest start's rank 0."""
        window = (back, self.data_step(back), self.data_step(done - 1) + 1)
        # What had been skipped after the checkpoint is within this window.
        self.windows = [*(each for each in self.windows if each[0] <= back), window]
        with store.replaced(self.path) as partial:
            records = ({"from_step": each, "first": first, "stop": stop} for each, first, stop in self.windows)
            partial.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
