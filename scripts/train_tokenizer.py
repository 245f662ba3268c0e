"""Train a byte-level BPE tokenizer for RoBERTa.

python scripts/train_tokenizer.py --input corpus.txt --output tokenizer --vocab_size 52000 --min_frequency 2
"""

import argparse
import sys
from pathlib import Path

from kantai import UserError, run_command
from kantai.checkpoint import staged
from kantai.corpus import add_arguments, documents, find_files
from kantai.tokenizer import save_tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--vocab_size", type=int, default=52_000, help="most entries (default 52000)")
    parser.add_argument("--min_frequency", type=int, default=2, help="occurrences that make a pair an entry (default 2)")
    arguments = parser.parse_args()

    with staged(arguments.output, kind="tokenizer") as folder:
        texts = documents(find_files(arguments.input), arguments.document, arguments.text_field)
        tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.min_frequency, show_progress=sys.stderr.isatty())
        size = tokenizer.get_vocab_size()
        if size == 261:
            raise UserError("the corpus filled no entry beyond the single bytes: bring more text, or lower --min_frequency")
        save_tokenizer(tokenizer, folder)
    print(f"{arguments.output}: the corpus filled {size:,} of {arguments.vocab_size:,} entries")


if __name__ == "__main__":
    run_command(main)
