"""Options that several verbs take, stated once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="A UTF-8 text file, or a folder with some; may be given several times. Take text that the model was "
        "not trained on. Default: the files of Python's own library that `quickstart` holds out.",
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to load it: cpu, cuda, … Default: cpu.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
