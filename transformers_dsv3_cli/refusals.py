"""How the verbs say what the library refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def as_bad_parameters() -> Iterator[None]:
    """Options that the library refuses are refused as typer refuses them: usage, the option's name, one line."""
    from transformers_dsv3.option_error import OptionError

    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
