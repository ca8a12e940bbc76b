"""What is asked for and cannot be done, said of the option that asks for it. The standard library only."""


class OptionError(ValueError):
    """A refused option, before anything expensive. `option` is the command-line option or argument at fault."""

    def __init__(self, option: str, message: str):
        super().__init__(message)
        self.option = option
