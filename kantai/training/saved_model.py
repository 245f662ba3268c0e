"""The model of a run's checkpoint, also while the run goes on and prunes checkpoints."""

from collections.abc import Callable

from kantai.checkpoint.state import load_weights
from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta, build_model
from kantai.training.run_dir import RunDir


def load_saved_model(
    run_dir: RunDir, step: int, choose_again: Callable[[], int]
) -> tuple[MaskedRoberta, int]:
    """The model at a checkpoint that was verified, and the checkpoint's step.

    Args:
        choose_again: gives the step of another one where this one was pruned meanwhile.

    Raises:
        UserError: the checkpoint is of another model.
    """
    data = run_dir.data
    model = build_model(run_dir.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)
    while True:
        try:
            load_weights(model, run_dir.store.path(step))
        except UserError:
            if run_dir.store.path(step).exists():
                raise
            step = choose_again()
        else:
            return model, step
