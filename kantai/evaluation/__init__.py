"""How good a model is: the held-out loss, and words for masked prompts."""
