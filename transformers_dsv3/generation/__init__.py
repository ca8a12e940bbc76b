"""Continuous batching: many requests decoded together, on pages of latents."""
