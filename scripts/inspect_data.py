"""Look at shards, at what a step showed, and at the hash of a stretch of the stream, which is the same on every cluster.

python scripts/inspect_data.py --shards data/shards --tokenizer data/tokenizer
python scripts/inspect_data.py --config configs/roberta-base.yaml --hash 0 200 --step 1000 --world_size 8 --rank 3
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="folder or URL of shards to describe")
    parser.add_argument("--tokenizer", type=lambda name: load_tokenizer(Path(name)), help="their tokenizer, to write tokens as text")
    parser.add_argument("--config", help="a YAML file; --section.key=value may follow; what its run skipped is heeded")
    parser.add_argument("--step", type=int, help="decode what this step showed, counted from 0; masked tokens as [shown|true]")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks that it was dealt to (default 1)")
    parser.add_argument("--rank", type=int, default=0, help="the rank to look at (default 0)")
    parser.add_argument("--rows", type=int, default=4, help="most rows to print (default 4)")
    parser.add_argument("--hash", type=int, nargs=2, metavar=("FIRST", "STOP"), help="hash the stream of these steps")
    arguments, overrides = parser.parse_known_args()
    if (arguments.config is None) == (arguments.shards is None) or (arguments.shards and overrides):
        raise UserError(f"give either --shards or --config{f', and not {overrides[0]}' if overrides else ''}; see --help")
    if arguments.shards:
        print(*describe_shards(open_shards(arguments.shards, cache=shard_cache), arguments.tokenizer), sep="\n")
        return
    if not 0 <= arguments.rank < arguments.world_size or (arguments.step or 0) < 0 or not 0 <= (arguments.hash or [0])[0]:
        raise UserError("steps are counted from 0, and ranks from 0 to one less than --world_size")
    data = open_data(config := load_config(arguments.config, overrides))
    batches, run = data.training_batches(arguments.world_size), SkippedData.of(Path(config.run_dir))
    if run.windows:
        refuse_other_run(config, saved_config(config.run_dir))
    if arguments.step is None and arguments.hash is None:
        print(*describe_shards(data.shards, data.vocabulary, sorted({shape.seq_len for shape in config.batch_shapes()})), sep="\n")
    if arguments.step is not None:
        print(*describe_step(data, batches, arguments.step, arguments.rank, arguments.rows, at=run.data_step), sep="\n")
    if arguments.hash is not None:
        print(f"steps {arguments.hash[0]} to {arguments.hash[1] - 1}:", hash_stream(batches, *arguments.hash, at=run.data_step))


if __name__ == "__main__":
    run_command(main)
