"""Describe shards, decode what a step showed, and hash a stretch of the stream.

The hash is the same on every cluster.

python scripts/inspect_data.py --shards data/shards --tokenizer data/tokenizer
python scripts/inspect_data.py --config configs/roberta-base.yaml --hash 0 200
python scripts/inspect_data.py --config configs/roberta-base.yaml --step 9 --world_size 8 --rank 3
"""

import argparse
from pathlib import Path

from kantai.config.loading import load_config, refuse_other_run
from kantai.data.dataset import open_data, shard_cache
from kantai.data.inspect import describe_shards, describe_step, hash_stream
from kantai.data.shards import open_shards
from kantai.data.tokenizer import load_tokenizer
from kantai.errors import UserError, run_command
from kantai.training.run_dir import saved_config
from kantai.training.skipped_data import SkippedData


def main() -> None:
    arguments, overrides = parse()
    if arguments.shards:
        shards = open_shards(arguments.shards, cache=shard_cache)
        print(*describe_shards(shards, arguments.tokenizer), sep="\n")
        return

    config = load_config(arguments.config, overrides)
    data = open_data(config)
    batches = data.training_batches(arguments.world_size)
    skipped = SkippedData.of(Path(config.run_dir))
    if skipped.windows:
        refuse_other_run(config, saved_config(config.run_dir), of_stream=True)
    if arguments.step is None and arguments.hash is None:
        seq_lens = sorted({shape.seq_len for shape in config.batch_shapes()})
        print(*describe_shards(data.shards, data.vocabulary, seq_lens), sep="\n")
    if arguments.step is not None:
        step, rank, rows = arguments.step, arguments.rank, arguments.rows
        print(*describe_step(data, batches, step, rank, rows, at=skipped.data_step), sep="\n")
    if arguments.hash is not None:
        first, stop = arguments.hash
        digest = hash_stream(batches, first, stop, at=skipped.data_step)
        print(f"steps {first} to {stop - 1}:", digest)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the overrides of a config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", help="folder or URL of shards to describe")
    parser.add_argument(
        "--tokenizer",
        type=lambda name: load_tokenizer(Path(name)),
        help="the shards' tokenizer, to write tokens as text",
    )
    parser.add_argument(
        "--config",
        help="a YAML file; --section.key=value may follow; data that the run skipped is left out",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="decode what this step showed, counted from 0; masked tokens as [shown|true]",
    )
    parser.add_argument(
        "--world_size", type=int, default=1, help="ranks that the step is dealt to (default 1)"
    )
    parser.add_argument("--rank", type=int, default=0, help="the rank to look at (default 0)")
    parser.add_argument("--rows", type=int, default=4, help="most rows to print (default 4)")
    parser.add_argument(
        "--hash",
        type=int,
        nargs=2,
        metavar=("FIRST", "STOP"),
        help="hash the stream of the steps from FIRST up to STOP",
    )
    arguments, overrides = parser.parse_known_args()
    if (arguments.config is None) == (arguments.shards is None) or (arguments.shards and overrides):
        extra = f", and not {overrides[0]}" if overrides else ""
        raise UserError(f"give either --shards or --config{extra}; see --help")
    first = min(arguments.step or 0, arguments.hash[0] if arguments.hash else 0)
    if arguments.config and (first < 0 or not 0 <= arguments.rank < arguments.world_size):
        raise UserError("steps are counted from 0, and ranks from 0 to one less than --world_size")
    return arguments, overrides


if __name__ == "__main__":
    run_command(main)
