"""Sharing models: model cards, uploads to the Hugging Face Hub, and checked downloads from it."""
