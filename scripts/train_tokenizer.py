"""Train a byte-level BPE tokenizer for RoBERTa.

python scripts/train_tokenizer.py --input corpus.txt --output tokenizer --vocab_size 52000
"""

import argparse
import json
from functools import partial
from pathlib import Path

from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import run_command
from kantai.output import redact_all
from kantai.preprocessing.documents import (
    add_corpus_arguments,
    corpus_reader,
    splittable,
    with_progress_bar,
)
from kantai.preprocessing.encodings import judged
from kantai.preprocessing.files import find_files
from kantai.preprocessing.lines import Report
from kantai.preprocessing.sampling import draw_samples
from kantai.preprocessing.tokenizer_training import (
    LongWords,
    check_settings,
    coverage,
    describe_coverage,
    refuse_bytes_alone,
    train_tokenizer,
)
from kantai.storage.atomic import staged


def main() -> None:
    arguments = parse_arguments()
    own = arguments.special_tokens
    check_settings(arguments.vocab_size, arguments.min_frequency, arguments.sample_bytes, own)
    report = Report()
    read = corpus_reader(arguments)
    with staged(arguments.output, kind="tokenizer") as folder:
        files = find_files(arguments.input, arguments.format)
        can_split = partial(splittable, unit=arguments.document)
        sample, rest = draw_samples(
            files, int(arguments.sample_bytes), arguments.seed, read, splittable=can_split
        )
        texts = judged(sample.read(partial(read, report=report)), files, report.tallies)
        texts = with_progress_bar(texts, sample.expected_bytes, "reading")
        cut = LongWords()
        tokenizer = train_tokenizer(
            texts, arguments.vocab_size, arguments.min_frequency, special_tokens=own, long_words=cut
        )
        save_tokenizer(tokenizer, folder)
        vocabulary = load_tokenizer(folder)
        refuse_bytes_alone(vocabulary, own)
        fit = coverage(vocabulary, rest.read(read))
        corpus_bytes = sum(file.text_bytes for file in files)
        content = {
            "corpus_bytes": corpus_bytes,
            "corpus_files": len(files),
            "sample_bytes": sample.bytes,
            "sample_files": sample.files,
            "seed": arguments.seed,
            "coverage": fit,
            "read": redact_all(report.counts()),
            "long_words": vars(cut),
        }
        text = json.dumps(content, indent=1) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
    for note in (*report.notes(), *cut.notes()):
        print(note)
    entries = f"{vocabulary.size:,} of {arguments.vocab_size:,} entries"
    print(f"{arguments.output}: the corpus filled {entries}")
    print(
        f"trained on {sample.bytes:,} of about {corpus_bytes:,} bytes, "
        f"in {sample.files:,} of {len(files):,} files"
    )
    print(describe_coverage(fit))


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
    own = "entries of your own, such as '<url>': one token wherever a text has it"
    parser.add_argument("--special_tokens", nargs="+", default=[], metavar="TOKEN", help=own)
    sample = "bytes of text to train on, drawn from all of the input (default 1e9)"
    parser.add_argument("--sample_bytes", type=float, default=1e9, help=sample)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
