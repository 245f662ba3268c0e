"""Convert a config file or a run directory of kantai 0.1 to this release, in place.

python scripts/convert.py configs/mine.yaml
python scripts/convert.py runs/mine
"""

import argparse
from pathlib import Path

from kantai.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="YAML file or run directory")
    path = parser.parse_args().path
    if not path.exists():
        raise UserError(f"there is nothing at {path}")
    from kantai.training.conversion import convert_config_file, convert_run

    if path.is_dir():
        for line in convert_run(path):
            print(line, flush=True)
    elif convert_config_file(path):
        print(f"{path}: settings renamed")
    else:
        print(f"{path}: nothing to rename")


if __name__ == "__main__":
    run_command(main)
