"""How text becomes a tokenizer and shards: done once, before training."""
