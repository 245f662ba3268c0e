"""Prove on your own machines, with your own config, that the promises hold there.

accelerate launch --config_file configs/accelerate/zero2.yaml --num_processes 4 \
    scripts/verify.py --config configs/roberta-base.yaml

It prints a table and writes a certificate. Loss and gradient norm of some steps are compared over
ranks, gradient accumulation, micro-batch sizes, this backend and plain DDP, saving and resuming;
the data stream with what it must be; the exported model with the trained one. Dropout is off, and
batches are small. The exit code is 1 when a promise does not hold.
"""

import argparse
import sys
from pathlib import Path

from kantai.cluster.environment import RankInfo
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file of the run; --section.key=value overrides any key in it",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of each comparison (default 3)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("certificate.json"),
        help="the certificate, in a folder that all nodes see (default: certificate.json here)",
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: must be at least 1")
    output = arguments.output.absolute()
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    rank_info = RankInfo.from_environment()
    config = load_config(arguments.config, overrides)
    data = open_data(config, hashes=rank_info.local_rank == 0)
    from kantai.diagnostics.verify import (
        certify,
    )  # imports torch, which bad input need not wait for

    sys.exit(0 if certify(config, rank_info, data, arguments.steps, output) else 1)


if __name__ == "__main__":
    run_command(main)
