"""What the model is shown at step t: shards, shuffle, packing, masking, batches."""
