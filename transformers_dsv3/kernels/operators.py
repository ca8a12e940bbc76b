"""How functions become torch operators, `torch.ops.transformers_dsv3.*`, with fake kernels for `torch.compile`.

All are made by this one file: torch keeps the place of every registration, for which Python's `inspect` looks through
all modules that are loaded, once for each file that registers something.
"""

from collections.abc import Callable
from typing import Any

import torch


_definitions = torch.library.Library("transformers_dsv3", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    key: str = "CompositeExplicitAutograd",
    gradients: tuple[Callable, Callable] | None = None,
) -> Any:
    """Makes an operator of a function, and returns it.

    Args:
        schema: its name and arguments; the name alone where the function's annotations say the rest.
        fake: gives results of the right shape and dtype without computing them.
        key: where it is for, in the words of PyTorch's dispatcher; every device by default.
        gradients: the backward function and what keeps its inputs, as `torch.library.register_autograd` takes them.
    """
    name, bracket, _ = schema.partition("(")
    _definitions.define(schema if bracket else name + torch.library.infer_schema(kernel, mutates_args=()))
    _definitions.impl(name, kernel, key)
    qualified = f"transformers_dsv3::{name}"
    torch.library.register_fake(qualified, fake, lib=_definitions)
    if gradients is not None:
        backward, keep = gradients
        torch.library.register_autograd(qualified, backward, setup_context=keep, lib=_definitions)
    return getattr(torch.ops.transformers_dsv3, name)
