"""The RoBERTa that is trained: stock weights, its own forward pass."""
