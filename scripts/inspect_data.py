"""Look at shards, at what an update showed, and at the hash of a stretch of the stream, which is the same on every cluster.

python scripts/inspect_data.py --shards data/shards --tokenizer data/tokenizer
python scripts/inspect_data.py --config configs/roberta-base.yaml --hash 0 200 --update 1000 --world_size 8 --rank 3
"""

import argparse
from pathlib import Path

from kantai.config.loading import load_config, refuse_other_run
from kantai.data.dataset import open_data, shard_cache
from kantai.data.inspect import describe_shards, describe_update, hash_stream
from kantai.data.shards import open_shards
from kantai.data.tokenizer import load_tokenizer
from kantai.errors import UserError, run_command
from kantai.training.run_dir import saved_config
from kantai.training.skipped_data import PassedOver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="folder or URL of shards to describe")
    parser.add_argument("--tokenizer", type=lambda name: load_tokenizer(Path(name)), help="their tokenizer, to write tokens as text")
    parser.add_argument("--config", help="a YAML file; --section.key=value may follow; what its run passed over is heeded")
    parser.add_argument("--update", type=int, help="decode what this update showed, counted from 0; masked tokens as [shown|true]")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks that it was dealt to (default 1)")
    parser.add_argument("--rank", type=int, default=0, help="the rank to look at (default 0)")
    parser.add_argument("--rows", type=int, default=4, help="most rows to print (default 4)")
    parser.add_argument("--hash", type=int, nargs=2, metavar=("FIRST", "STOP"), help="hash the stream of these updates")
    arguments, overrides = parser.parse_known_args()
    if (arguments.config is None) == (arguments.shards is None) or (arguments.shards and overrides):
        raise UserError(f"give either --shards or --config{f', and not {overrides[0]}' if overrides else ''}; see --help")
    if arguments.shards:
        print(*describe_shards(open_shards(arguments.shards, cache=shard_cache), arguments.tokenizer), sep="\n")
        return
    if not 0 <= arguments.rank < arguments.world_size or (arguments.update or 0) < 0 or not 0 <= (arguments.hash or [0])[0]:
        raise UserError("updates are counted from 0, and ranks from 0 to one less than --world_size")
    data = open_data(config := load_config(arguments.config, overrides))
    batches, run = data.training_batches(arguments.world_size), PassedOver.of(Path(config.run_dir))
    if run.windows:
        refuse_other_run(config, saved_config(config.run_dir))
    if arguments.update is None and arguments.hash is None:
        print(*describe_shards(data.shards, data.vocabulary, sorted({shape.seq_len for shape in config.batch_shapes()})), sep="\n")
    if arguments.update is not None:
        print(*describe_update(data, batches, arguments.update, arguments.rank, arguments.rows, at=run.data_update), sep="\n")
    if arguments.hash is not None:
        print(f"updates {arguments.hash[0]} to {arguments.hash[1] - 1}:", hash_stream(batches, *arguments.hash, at=run.data_update))


if __name__ == "__main__":
    run_command(main)
