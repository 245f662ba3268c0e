"""Tokenize a corpus into shards, with a training and a held-out split.

python scripts/tokenize_corpus.py --input corpus.txt --tokenizer tokenizer --output shards --document paragraph
"""

import argparse
from pathlib import Path

from kantai import run_command
from kantai.corpus import add_arguments, documents, find_files, with_bar
from kantai.shards import write_shards
from kantai.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by train_tokenizer.py")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--held_out", type=float, default=0.01, help="share of the documents that is never trained on (default 0.01)")
    arguments = parser.parse_args()

    files = find_files(arguments.input)
    vocabulary = load_tokenizer(arguments.tokenizer)
    texts = with_bar(documents(files, arguments.document, arguments.text_field), files)
    manifest = write_shards(
        texts,
        arguments.output,
        encode=vocabulary.encode,
        vocab_size=vocabulary.size,
        eos_id=vocabulary.eos_id,
        fingerprint=vocabulary.fingerprint,
        source={"files": [str(file) for file in files], "document": arguments.document},
        held_out_share=arguments.held_out,
    )
    for name, split in manifest["splits"].items():
        print(f"{arguments.output} {name}: {split['documents']:,} documents, {split['tokens']:,} tokens")


if __name__ == "__main__":
    run_command(main)
