"""Tokenize a corpus into shards of a training and a held-out split.

python scripts/tokenize_corpus.py --input corpus.txt --tokenizer tokenizer --output shards \\
    --document paragraph

Run the same command again after a kill, and it continues where it was.

In a SLURM array, give each task --part $SLURM_ARRAY_TASK_ID --parts $SLURM_ARRAY_TASK_COUNT, and a
last job --merge. All other arguments stay the same.

Documents of more than 32,768 characters, as a book in one line, are cut at sentence ends.
"""

import argparse
from pathlib import Path

from kantai.errors import UserError, run_command
from kantai.preprocessing.documents import add_corpus_arguments, pieces
from kantai.preprocessing.files import File, find_files, refuse_shared
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import describe, merge
from kantai.preprocessing.tokenize import tokenize
from kantai.storage.atomic import refuse_url


def main() -> None:
    arguments = parse_arguments()
    is_part = arguments.part is not None
    if is_part != (arguments.parts is not None) or (arguments.merge and is_part):
        raise UserError("give --part and --parts together, and --merge without them")
    job = make_job(arguments)
    if is_part:
        tokenize(job, part=arguments.part, parts=arguments.parts, processes=arguments.processes)
        return
    if not arguments.merge:
        tokenize(job, processes=arguments.processes)
    for line in describe(merge(job)):
        print(line)


def make_job(arguments: argparse.Namespace) -> Job:
    refuse_url(arguments.output)  # before a search for files
    source = {"input": arguments.input, "document": arguments.document}
    files = find_files(arguments.input, arguments.format)
    held_out_files: list[File] = []
    if arguments.held_out_input and arguments.held_out is not None:
        raise UserError("give either --held_out or --held_out_input")
    if arguments.held_out_input:
        source["held_out_input"] = arguments.held_out_input
        held_out_files = find_files(arguments.held_out_input, arguments.format)
        refuse_shared(files, held_out_files)
    return Job(
        pieces(files, arguments.document),
        arguments.document,
        arguments.text_field,
        arguments.tokenizer,
        arguments.output,
        source,
        held_out_share=0.01 if arguments.held_out is None else arguments.held_out,
        unique=arguments.unique,
        held_out_pieces=pieces(held_out_files, arguments.document),
        on_error=arguments.on_error,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder written by train_tokenizer.py"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the shards")
    parser.add_argument(
        "--held_out",
        type=float,
        help="share of the documents that is never trained on (default 0.01)",
    )
    parser.add_argument(
        "--held_out_input",
        nargs="+",
        metavar="INPUT",
        help="text of your own that is the held-out split, in place of a share of --input",
    )
    parser.add_argument(
        "--unique",
        action="store_true",
        help="deduplicate: keep only the first of the documents with exactly the same text",
    )
    parser.add_argument("--processes", type=int, help="processes to run (default: one per core)")
    parser.add_argument("--part", type=int, help="do only this part of the work, counted from 0")
    parser.add_argument("--parts", type=int, help="number of parts that the work is divided into")
    parser.add_argument("--merge", action="store_true", help="merge the parts, once all are done")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
