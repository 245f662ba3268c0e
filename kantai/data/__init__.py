"""The data of each step: shards, shuffle, packing, masking, batches, loader."""
