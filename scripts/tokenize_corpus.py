"""Tokenize a corpus into shards, with a training and a held-out split. Killed, it goes on where it was when it is started again.

python scripts/tokenize_corpus.py --input corpus.txt --tokenizer tokenizer --output shards --document paragraph

In a SLURM array each task does a part, with --part $SLURM_ARRAY_TASK_ID --parts $SLURM_ARRAY_TASK_COUNT, and a last job the --merge;
all other arguments are the same.
"""

import argparse
from pathlib import Path

from kantai.errors import UserError, run_command
from kantai.preprocessing.documents import add_corpus_arguments, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import describe, merge
from kantai.preprocessing.tokenize import tokenize


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder written by train_tokenizer.py"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--held_out",
        type=float,
        default=0.01,
        help="share of the documents that is never trained on (default 0.01)",
    )
    parser.add_argument(
        "--unique",
        action="store_true",
        help="of documents with exactly the same text, keep the first",
    )
    parser.add_argument("--processes", type=int, help="processes at work (default: one a core)")
    parser.add_argument("--part", type=int, help="do only this part of the work, counted from 0")
    parser.add_argument("--parts", type=int, help="parts that the work is divided into")
    parser.add_argument(
        "--merge", action="store_true", help="put together what all parts have done"
    )
    arguments = parser.parse_args()

    if (arguments.part is None) != (arguments.parts is None) or (
        arguments.merge and arguments.part is not None
    ):
        raise UserError("give --part and --parts together, and --merge without them")
    found = pieces(find_files(arguments.input), arguments.document)
    source = {"input": arguments.input, "document": arguments.document}
    how = arguments.document, arguments.text_field, arguments.tokenizer, arguments.output
    job = Job(found, *how, source, held_out_share=arguments.held_out, unique=arguments.unique)
    if not arguments.merge:
        part, parts = arguments.part or 0, 1 if arguments.parts is None else arguments.parts
        tokenize(job, part=part, parts=parts, processes=arguments.processes)
    if arguments.part is None:
        print(*describe(merge(job)), sep="\n")


if __name__ == "__main__":
    run_command(main)
