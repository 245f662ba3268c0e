"""Kill, starve and corrupt small runs on your own storage, and check that nothing is lost.

python scripts/chaos.py --work /scratch/me/chaos

Every disturbed run must end with the weights, moments and losses of an undisturbed run, to the
last bit. The test takes a quarter of an hour. Started again, it goes on where it was. The exit
code is 1 when a run ended otherwise, a corruption was not detected, or a start failed by itself.
"""

import argparse
import sys
from pathlib import Path

from kantai.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the runs, on the storage to test"
    )
    for name, default, meaning in (
        ("--kills", 200, "SIGKILLs, of all ranks or of one"),
        ("--corruptions", 100, "bits to flip, files to cut off or remove"),
        ("--ranks", 2, "processes of a run"),
        ("--seed", 0, "seed of the schedule"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default {default})")
    arguments = parser.parse_args()
    if min(arguments.kills, arguments.corruptions) < 0 or arguments.ranks < 1:
        raise UserError("give --kills and --corruptions of at least 0, and --ranks of at least 1")
    from kantai.diagnostics.chaos import chaos

    counts = (arguments.kills, arguments.corruptions, arguments.ranks)
    is_clean = chaos(arguments.work.absolute(), *counts, arguments.seed)
    sys.exit(0 if is_clean else 1)


if __name__ == "__main__":
    run_command(main)
