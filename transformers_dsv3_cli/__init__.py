"""The `transformers-dsv3` command: one module a verb, each a thin shell over `transformers_dsv3`.

A package of its own, since Python imports a package before what is inside it, and `transformers_dsv3` registers the
model classes when it is imported: `--help` would wait for torch and Transformers.
"""
