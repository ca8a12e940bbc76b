"""The `transformers-dsv3` command: one module a verb, each a thin shell over the package."""
