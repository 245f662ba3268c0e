"""Train a byte-level BPE tokenizer for RoBERTa.

python scripts/train_tokenizer.py --input corpus.txt --output tokenizer --vocab_size 52000
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

from kantai.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer
from kantai.errors import UserError, run_command
from kantai.preprocessing.documents import (
    add_corpus_arguments,
    corpus_reader,
    splittable,
    with_progress_bar,
)
from kantai.preprocessing.files import find_files
from kantai.preprocessing.lines import Report
from kantai.preprocessing.sampling import draw_samples
from kantai.preprocessing.tokenizer_training import check_settings, coverage, train_tokenizer
from kantai.storage.atomic import staged


def main() -> None:
    arguments = parse_arguments()
    check_settings(arguments.vocab_size, arguments.min_frequency, arguments.sample_bytes)
    report = Report()
    read = corpus_reader(arguments)
    with staged(arguments.output, kind="tokenizer") as folder:
        files = find_files(arguments.input, arguments.format)
        sample, rest = draw_samples(
            files,
            int(arguments.sample_bytes),
            arguments.seed,
            read,
            splittable=partial(splittable, unit=arguments.document),
        )
        texts = sample.read(partial(read, report=report))
        texts = with_progress_bar(texts, sample.expected_bytes, "reading")
        tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.min_frequency)
        save_tokenizer(tokenizer, folder)
        vocabulary = load_tokenizer(folder)
        if vocabulary.size == len(SPECIAL_TOKENS) + 256:
            raise UserError(
                "the corpus filled no entry beyond the single bytes: "
                "bring more text, or lower --min_frequency"
            )
        fit = coverage(vocabulary, rest.read(read))
        corpus_bytes = sum(file.text_bytes for file in files)
        content = {
            "corpus_bytes": corpus_bytes,
            "corpus_files": len(files),
            "sample_bytes": sample.bytes,
            "sample_files": sample.files,
            "seed": arguments.seed,
            "coverage": fit,
            "read": dataclasses.asdict(report),
        }
        text = json.dumps(content, indent=1) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
    for note in report.notes():
        print(note)
    entries = f"{vocabulary.size:,} of {arguments.vocab_size:,} entries"
    print(f"{arguments.output}: the corpus filled {entries}")
    print(
        f"trained on {sample.bytes:,} of about {corpus_bytes:,} bytes, "
        f"in {sample.files:,} of {len(files):,} files"
    )
    print(
        f"{fit['bytes_per_token']:.2f} bytes and {fit['words_per_token']:.2f} words a token, "
        f"{fit['one_token_words']:.0%} of words whole"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the tokenizer")
    size = "maximum number of entries (default 52000)"
    parser.add_argument("--vocab_size", type=int, default=52_000, help=size)
    frequency = "how often a pair must occur to become an entry (default 2)"
    parser.add_argument("--min_frequency", type=int, default=2, help=frequency)
    parser.add_argument(
        "--sample_bytes",
        type=float,
        default=1e9,
        help="bytes of text to train on, drawn from all of the input (default 1e9)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
