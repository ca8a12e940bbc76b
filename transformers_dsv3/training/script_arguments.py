"""The command line of a training script: short help on mistakes, and checks of what trainers find out late."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from .run_folder import RunFolder


def run_defaults() -> dict[str, Any]:
    """Fields of `TrainingArguments` for a run of minutes on this machine, which is resumed after any interruption."""
    gpu = torch.cuda.is_available()
    return {
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 2,
        # Two threads otherwise add the gradients of an embedding row in any order, and no two runs end alike.
        "full_determinism": not gpu,
        "dataloader_pin_memory": gpu,
        "use_cpu": not torch.accelerator.is_available(),  # else several processes would each train by themselves
    }


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that says in one line what is wrong, with the defaults of [`run_defaults`].

    Transformers' own ends in a traceback for a flag that it does not know and for values that `TrainingArguments`
    refuses, and spends its first hundred lines of help on a list of all flags.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, **{"usage": "%(prog)s [-h] [--FLAG VALUE ...]", **kwargs})
        known = {field.name for cls in self.dataclass_types for field in fields(cls)}
        self.set_defaults(**{name: value for name, value in run_defaults().items() if name in known})

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

    def run(self, main: Callable[..., None]) -> None:
        """Call `main` with what the command line says, one argument a dataclass, `TrainingArguments` last.

        Stopped by Ctrl-C, it says how to go on, see [`RunFolder.explaining_interruption`].
        """
        arguments = self.parse_args_into_dataclasses()
        with RunFolder(arguments[-1].output_dir).explaining_interruption(arguments[-1]):
            main(*arguments)


@contextmanager
def exit_on_refusal() -> Iterator[None]:
    """For what a script does before it trains: what is refused there ends the script in one line, with its name.

    Raises:
        SystemExit: for a ValueError, an OSError or a config that fails the checks of its fields.
    """
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


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
