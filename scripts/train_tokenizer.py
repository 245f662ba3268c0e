"""Train a byte-level BPE tokenizer for RoBERTa.

python scripts/train_tokenizer.py --input corpus.txt --output tokenizer --vocab_size 52000 --min_frequency 2
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import UserError, run_command
from kantai.preprocessing.documents import (
    add_corpus_arguments,
    documents,
    splittable,
    with_progress_bar,
)
from kantai.preprocessing.files import find_files
from kantai.preprocessing.lines import Report
from kantai.preprocessing.sampling import draw_samples
from kantai.preprocessing.tokenizer_training import check_numbers, coverage, train_tokenizer
from kantai.storage.atomic import staged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--vocab_size", type=int, default=52_000, help="most entries (default 52000)"
    )
    parser.add_argument(
        "--min_frequency",
        type=int,
        default=2,
        help="occurrences that make a pair an entry (default 2)",
    )
    parser.add_argument(
        "--sample_bytes",
        type=float,
        default=1e9,
        help="text to train on, drawn from all of the input (default 1e9)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    arguments = parser.parse_args()
    check_numbers(arguments.vocab_size, arguments.min_frequency, arguments.sample_bytes)
    unit, report = arguments.document, Report()
    read = partial(documents, unit=unit, text_field=arguments.text_field)
    with staged(arguments.output, kind="tokenizer") as folder:
        files = find_files(arguments.input)
        sample, rest = draw_samples(
            files,
            int(arguments.sample_bytes),
            arguments.seed,
            read,
            splittable=partial(splittable, unit=unit),
        )
        texts = with_progress_bar(
            sample.read(partial(read, report=report)), sample.expected_bytes, "reading"
        )
        save_tokenizer(
            train_tokenizer(texts, arguments.vocab_size, arguments.min_frequency), folder
        )
        vocabulary = load_tokenizer(folder)
        if vocabulary.size == 261:
            raise UserError(
                "the corpus filled no entry beyond the single bytes: bring more text, or lower "
                "--min_frequency"
            )
        fit = coverage(vocabulary, rest.read(read))
        sizes = {
            "corpus_bytes": sum(file.text_bytes for file in files),
            "corpus_files": len(files),
            "sample_bytes": sample.bytes,
        }
        content = {
            **sizes,
            "sample_files": sample.files,
            "seed": arguments.seed,
            "coverage": fit,
            "read": dataclasses.asdict(report),
        }
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(
        *report.notes(),
        f"{arguments.output}: the corpus filled {vocabulary.size:,} of {arguments.vocab_size:,} "
        "entries",
        sep="\n",
    )
    print(
        f"trained on {sample.bytes:,} of about {sizes['corpus_bytes']:,} bytes, in "
        f"{sample.files:,} of {len(files):,} files"
    )
    print(
        f"{fit['bytes_per_token']:.2f} bytes and {fit['words_per_token']:.2f} words a token, "
        f"{fit['one_token_words']:.0%} of words whole"
    )


if __name__ == "__main__":
    run_command(main)
