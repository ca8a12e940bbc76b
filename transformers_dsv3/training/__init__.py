"""Training recipes on Transformers' own `Trainer`."""
