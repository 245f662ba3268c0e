"""Kill, starve and corrupt small runs on your own storage, again and again, and see that nothing is lost.

python scripts/chaos.py --work /scratch/me/chaos

Every run that has come through it must end with the weights, moments and losses of one that was left alone, to the last bit. It takes a
quarter of an hour, and goes on where it was when it is started again. Exit code 1 when a run ended otherwise, or a corruption was
not detected.
"""

import argparse
import sys
from pathlib import Path

from kantai.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for it, on the storage in question")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of all ranks or one (default 200)")
    parser.add_argument("--corruptions", type=int, default=100, help="flipped bits, cut-off and missing files (default 100)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when (default 0)")
    arguments = parser.parse_args()
    if min(arguments.kills, arguments.corruptions) < 0 or arguments.ranks < 1:
        raise UserError("--kills and --corruptions must not be negative, and --ranks at least 1")
    from kantai.diagnostics.chaos import chaos

    held = chaos(arguments.work.absolute(), arguments.kills, arguments.corruptions, arguments.ranks, arguments.seed)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    run_command(main)
