"""The command line of a training script: short help on mistakes, and checks of what trainers find out late."""

from __future__ import annotations

from typing import Any

from transformers import HfArgumentParser, PretrainedConfig, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that says in one line what is wrong.

    Transformers' own ends in a traceback for a flag that it does not know and for values that `TrainingArguments`
    refuses, and spends its first hundred lines of help on a list of all flags.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, **{"usage": "%(prog)s [-h] [--FLAG VALUE ...]", **kwargs})

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            *parsed, unknown = super().parse_args_into_dataclasses(
                *args, **{**kwargs, "return_remaining_strings": True}
            )
        except (ValueError, ImportError) as error:
            self.error(str(error))
        if kwargs.get("return_remaining_strings"):
            return (*parsed, unknown)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(parsed)


def check_reporting(args: TrainingArguments) -> None:
    """Refuse `report_to` where a package for it is not installed, which the trainer finds out when it is made.

    Raises:
        ValueError: naming the package.
    """
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"--report_to {' '.join(args.report_to)}: {error}") from None


def override_config(config: PretrainedConfig, overrides: str) -> None:
    """Change fields of a config by `NAME=VALUE,NAME=VALUE`, each read as the type that the field has.

    Raises:
        ValueError: naming the field.
    """
    for override in overrides.split(","):
        name, equals, value = override.strip().partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form NAME=VALUE")
        if not hasattr(config, name) or callable(getattr(config, name)):
            raise ValueError(f"a {config.model_type} config has no field {name!r}")
        try:
            config.update_from_string(f"{name}={value}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
