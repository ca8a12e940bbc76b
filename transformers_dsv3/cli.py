"""`python -m transformers_dsv3.cli` is the `transformers-dsv3` command, for launchers that start modules.

The verbs are in `transformers_dsv3_cli`, a package beside this one: whatever is inside this one waits for torch.
"""

from transformers_dsv3_cli.main import app


if __name__ == "__main__":
    app(prog_name="transformers-dsv3")
