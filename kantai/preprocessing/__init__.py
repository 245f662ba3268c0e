"""From text to a tokenizer and shards, done once before training."""
