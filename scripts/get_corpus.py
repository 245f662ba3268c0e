"""Get a text to start with: Kant in English, or where there is no network, the prose in Python's own documentation.

python scripts/get_corpus.py --output corpus
"""

import argparse
from pathlib import Path

from kantai.errors import run_command
from kantai.preprocessing.starter_corpus import write_starter
from kantai.storage.atomic import staged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--name",
        choices=["auto", "kant", "python-docs"],
        default="auto",
        help="auto: kant, else python-docs (default)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()

    with staged(arguments.output, kind="corpus") as folder:
        said = write_starter(folder, arguments.name)
    print(said)


if __name__ == "__main__":
    run_command(main)
