"""Quantised formats read and written; checkpoints pruned and rounded to few bits, and plans of it."""
