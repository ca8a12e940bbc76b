"""Quantized checkpoints: reading DeepSeek's FP8 format."""
