"""Pretrain a masked language model, or go on with it: the same command does both.

accelerate launch --config_file configs/accelerate/cpu.yaml \
    scripts/pretrain.py --config configs/quickstart.yaml
"""

import argparse
import sys

from kantai.cluster.environment import RankInfo
from kantai.cluster.signals import exit_code_when_stopped
from kantai.config.loading import describe
from kantai.data.dataset import open_data
from kantai.errors import run_command
from kantai.training.run_dir import load_run_config, open_run_dir


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="settings, in the YAML file or as arguments:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file of the run; --section.key=value overrides any key in it",
    )
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="auto",
        help="auto: go on from the newest valid checkpoint of run_dir (default)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check config, data and run directory, and start nothing; takes a second",
    )
    arguments, overrides = parser.parse_known_args()

    rank_info = RankInfo.from_environment()
    say = print if rank_info.is_main else lambda _: None
    config = load_run_config(arguments.config, overrides, say)
    data = open_data(config, hashes=rank_info.local_rank == 0)
    resume = arguments.resume == "auto"
    run_dir = open_run_dir(config, data, resume=resume, config_file=arguments.config)
    is_finished = run_dir.is_finished()
    if arguments.check or is_finished:
        if rank_info.is_main:
            done = data.max_steps if is_finished else run_dir.newest()
            print(f"{run_dir.path}: {done} of {data.max_steps} steps done")
            notes = (data.describe_unshown(shape.seq_len) for shape in config.batch_shapes())
            print(*(f"{note}\n" for note in dict.fromkeys(notes) if note), sep="", end="")
        return
    # Only now: bad input need not wait for torch.
    from torch.distributed.elastic.multiprocessing.errors import record

    from kantai.training.trainer import train

    if not record(train)(run_dir, rank_info):
        sys.exit(exit_code_when_stopped())


if __name__ == "__main__":
    run_command(main)
