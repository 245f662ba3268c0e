"""Data that a run was not to see again after bad numbers."""

import json
from pathlib import Path

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError


class PassedOver:
    """The data that a run was not to see again after bad numbers: ``passed_over.jsonl`` in its directory.

    With it, what update *t* is shown stays a function of config, data, seed and *t*.

    Attributes:
        windows: (update from which on it holds, first update whose data was passed over, and the one behind the last).
    """

    def __init__(self, path: Path, windows: list[tuple[int, int, int]]) -> None:
        self.path, self.windows = path, windows

    @classmethod
    def of(cls, run_dir: Path) -> "PassedOver":
        """Of a run directory.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / "passed_over.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            records = [json.loads(line) for line in lines]
            return cls(path, [(int(each["from_update"]), int(each["first"]), int(each["stop"])) for each in records])
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(f"{path} is damaged: it says which data the run passes over; bring it back from a copy") from None

    def data_update(self, update: int) -> int:
        """The update whose data an update is shown."""
        return update + sum(stop - first for from_update, first, stop in self.windows if from_update <= update)

    def add(self, back: int, done: int, store: CheckpointStore) -> None:
        """From update ``back`` on, pass over the data that updates up to ``done`` were shown; for the latest start's rank 0."""
        window = (back, self.data_update(back), self.data_update(done - 1) + 1)
        # What had been passed over after the checkpoint is within this window.
        self.windows = [*(each for each in self.windows if each[0] <= back), window]
        with store.replaced(self.path) as partial:
            records = ({"from_update": each, "first": first, "stop": stop} for each, first, stop in self.windows)
            partial.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
