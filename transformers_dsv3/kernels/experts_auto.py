"""Experts by name in Transformers' `ExpertsInterface`: `"auto"`, and the backends of this package.

`"auto"` gives each call to the first of the table's backends that takes it. Asked for by its own name, a backend says
once why it does not take a call, which then goes the way of `"auto"`.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import backends, dispatch, experts_grouped, experts_liger, experts_triton, triton_support
from .cpu import mixture
from .selection import logger


NAME = "auto"
# Transformers' default. Where somebody has put a function of their own under its name, `auto` leaves the experts to it
GROUPED_MM = ALL_EXPERTS_FUNCTIONS["grouped_mm"]


# Of those that are asked for by name, why one does not take a call, and what takes it; None where `auto` would
# find it by itself
_BY_NAME: dict[str, tuple[Callable[..., str | None], Callable[..., torch.Tensor] | None]] = {
    mixture.NAME: (
        lambda module, hidden, weights: mixture.mixture_refusal(hidden, module, weights, None),
        None,
    ),
    triton_support.NAME: (experts_triton.experts_refusal, experts_triton.triton_experts),
    experts_liger.NAME: (experts_liger.call_refusal, experts_liger.liger_experts),
}


def serve_experts(
    name: str | None, module: nn.Module, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """The weighted sum of the chosen experts' outputs `(T, D)`, or None where it is left to the module's plain path.

    Args:
        name: what the model's configuration asks for. module: of experts.
        index, weights: `(T, K)`.
    """
    if name in _BY_NAME:
        refusal, function = _BY_NAME[name]
        reason = refusal(module, hidden_states, weights)
        if reason is None and function is not None:
            return function(module, hidden_states, index, weights)
        if reason is not None and not torch.compiler.is_compiling():
            logger.warning_once(f'experts_implementation="{name}" does not serve a call: it {reason}.')
    elif name != NAME:
        return None
    elif ALL_EXPERTS_FUNCTIONS["grouped_mm"] is not GROUPED_MM:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, index, weights)
    return dispatch.serve(backends.EXPERTS, module, hidden_states, module, index, weights)


def _function(name: str) -> Callable[..., torch.Tensor]:
    def experts(
        module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        found = serve_experts(name, module, hidden_states, top_k_index, top_k_weights)
        if found is None:
            found = backends.plain_experts(module, hidden_states, top_k_index, top_k_weights)
        return found

    return experts


auto_experts = _function(NAME)
cpu_experts = _function(mixture.NAME)
triton_experts = _function(triton_support.NAME)
liger_experts = _function(experts_liger.NAME)


def register() -> None:
    """Makes the names known to Transformers."""
    for name, function in (
        (NAME, auto_experts),
        (mixture.NAME, cpu_experts),
        (triton_support.NAME, triton_experts),
        (experts_liger.NAME, liger_experts),
        (experts_grouped.NAME, experts_grouped.grouped_experts),
    ):
        ALL_EXPERTS_FUNCTIONS.register(name, function)
