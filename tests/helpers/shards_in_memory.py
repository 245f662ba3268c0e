"""Shards in memory, for tests that write their rows by hand."""

import numpy as np

from kantai.data.shards import Shard, Split


def split_of(*shards: tuple[np.ndarray, list[int]]) -> Split:
    """Make a split of shards, each of tokens and document boundaries."""
    made = {
        str(number): Shard(tokens, np.array(boundaries, np.int32))
        for number, (tokens, boundaries) in enumerate(shards)
    }
    entries = [
        {"file": name, "documents": len(shard.boundaries) - 1, "tokens": len(shard.tokens)}
        for name, shard in made.items()
    ]
    return Split(entries, made.__getitem__)


def streams(*tokens: np.ndarray) -> Split:
    """Make a split of shards with one document each."""
    return split_of(*((stream, [0, len(stream)]) for stream in tokens))
