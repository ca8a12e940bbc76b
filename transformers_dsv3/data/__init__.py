"""Text collection, tokenizers and token blocks for training."""
