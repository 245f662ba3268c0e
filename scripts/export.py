"""Export a checkpoint of a run, by default the newest, as a Hugging Face model folder.

python scripts/export.py runs/quickstart/run --output model
python scripts/export.py runs/quickstart/run --output model --best
python scripts/export.py runs/moved --output model --data.tokenizer=new/place/tokenizer

The folder appears only after it was loaded back and has given the same logits.
"""

import argparse
from pathlib import Path

from kantai.errors import run_command
from kantai.storage.atomic import check_output
from kantai.training.run_dir import open_saved_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="--data.shards=... and --data.tokenizer=... say where these are now; other settings "
        "that may change between a run's starts can be given alike",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the lowest held-out loss"
    )
    arguments, overrides = parser.parse_known_args()

    check_output(arguments.output)  # before seconds of imports
    run_dir, step = open_saved_run(arguments.run, overrides, arguments.step, best=arguments.best)
    from transformers.utils import logging

    from kantai.export import export
    from kantai.training.saved_model import load_saved_model

    logging.disable_progress_bar()
    model, step = load_saved_model(
        run_dir, step, lambda: run_dir.choose(arguments.step, best=arguments.best)
    )
    difference = export(run_dir, model, step, arguments.output)
    print(
        f'{arguments.output}: step {step}, loaded back with pipeline("fill-mask"), '
        f"logits equal within {difference:.1g}"
    )


if __name__ == "__main__":
    run_command(main)
