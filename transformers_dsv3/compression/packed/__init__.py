"""Checkpoints of quantised weights that stay packed: compressed-tensors both ways; GPTQ and AWQ read."""
