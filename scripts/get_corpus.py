"""Get a starter corpus: Kant in English, or without a network the prose in Python's own library.

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
        help="which corpus; auto is kant if it can be fetched, else python-docs (default auto)",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the corpus")
    arguments = parser.parse_args()

    with staged(arguments.output, kind="corpus") as folder:
        message = write_starter(folder, arguments.name)
    print(message)


if __name__ == "__main__":
    run_command(main)
