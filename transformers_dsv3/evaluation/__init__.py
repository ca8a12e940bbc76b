"""Measurements of a model: bits per byte, decode speed, cache size."""
