"""Export the newest checkpoint of a run as a Hugging Face model folder.

python scripts/export.py runs/quickstart/run --output model

The folder appears only after it was loaded back and has given the same logits.
"""

import argparse
from pathlib import Path

from kantai.errors import run_command
from kantai.storage.atomic import check_output
from kantai.training.run_dir import open_saved_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()

    check_output(arguments.output)  # before seconds of imports
    run_dir, step = open_saved_run(arguments.run)
    from transformers.utils import logging

    from kantai.checkpoint.state import load_weights
    from kantai.export import export
    from kantai.model.roberta import build_model

    logging.disable_progress_bar()
    data = run_dir.data
    model = build_model(run_dir.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)
    load_weights(model, run_dir.store.path(step))
    difference = export(run_dir, model, step, arguments.output)
    print(
        f'{arguments.output}: step {step}, loaded back with pipeline("fill-mask"), '
        f"logits equal within {difference:.1g}"
    )


if __name__ == "__main__":
    run_command(main)
