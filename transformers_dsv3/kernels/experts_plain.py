"""Routed experts as a plain loop: the reference beside their kernels, and where these get second derivatives from.

Shape suffixes: T tokens, K experts chosen a token, E experts, N pairs of one expert, D hidden size, I width of an
expert, R rank of an adapter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class LowRank(NamedTuple):
    """What an adapter adds to a stack of weights `(E, out, in)`: `up_EOR @ down_ERI`, its scaling included."""

    down_ERI: torch.Tensor
    up_EOR: torch.Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over experts."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_experts(
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    w_TK: torch.Tensor,
    gate_up_EID: Any,
    down_EDI: Any,
    dtype: torch.dtype,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    gate_up: LowRank | None = None,
    down: LowRank | None = None,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs `(T, D)`, derivatives of any order by autograd.

    Args:
        index_TK: expert indices; E and beyond, experts of another rank, are left out.
        w_TK: mixing weights.
        gate_up_EID, down_EDI: tensors, or frozen weights as `QuantizedStack` has them.
        dtype: that of the products.
        gate_up, down: adapters of the two stacks.
    """

    def project(x_ND: torch.Tensor, weight: Any, adapter: LowRank | None, expert: int) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            y = F.linear(x_ND, weight[expert].to(dtype))
        else:
            y = weight.product(x_ND, expert)
        if adapter is not None:
            y = y + F.linear(F.linear(x_ND, adapter.down_ERI[expert]), adapter.up_EOR[expert])
        return y

    E = len(gate_up_EID)
    experts, pairs_S = index_TK.flatten().sort(stable=True)
    out_TD = torch.zeros_like(hidden_TD, dtype=accumulator_dtype(hidden_TD.dtype))
    start = 0
    for expert, count in enumerate(torch.bincount(experts, minlength=E)[:E].tolist()):
        pairs = pairs_S[start : start + count]
        start += count
        if count:
            tokens = pairs // index_TK.shape[1]
            gate, up = project(hidden_TD[tokens].to(dtype), gate_up_EID, gate_up, expert).chunk(2, dim=-1)
            y_ND = project(activation(gate) * up, down_EDI, down, expert)
            out_TD = out_TD.index_add(0, tokens, y_ND.to(out_TD.dtype) * w_TK.flatten()[pairs, None].to(out_TD.dtype))
    return out_TD.to(hidden_TD.dtype)


def is_batched(grad: torch.Tensor) -> bool:
    """Whether a gradient stands for several at once, of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)


def differentiable_gradients(
    plain: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
    grad: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, of a function whose own backward pass is written by hand.

    For backward passes with `create_graph=True`, in which gradients are enabled: they compute the plain reference once
    more, and leave its derivatives to autograd.

    Args:
        plain: from `inputs` to what `grad` is the gradient of.
        needs: for each of the inputs, whether its gradient is asked for.
    """
    wanted = [x for x, needed in zip(inputs, needs) if needed and x is not None]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(plain(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed and x is not None else None for x, needed in zip(inputs, needs)]
