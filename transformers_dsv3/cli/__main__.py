"""`python -m transformers_dsv3.cli` is the `transformers-dsv3` command."""

from .main import app


app(prog_name="transformers-dsv3")
