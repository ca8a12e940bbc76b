"""Options that cannot be meant."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class OptionError(ValueError):
    """What was asked for cannot be measured. `option` is the command-line option or argument at fault."""

    def __init__(self, option: str, message: str):
        super().__init__(message)
        self.option = option


def check_dtype(dtype: str) -> None:
    """Refuse what no model is loaded in. Raises `OptionError`."""
    if dtype not in DTYPES:
        raise OptionError("--dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
