"""Linear layers with gradients in fp32 on the CPU, by oneDNN where it is faster than MKL (see `matmul_cpu`).

Shape suffixes: M rows, K inputs, N outputs.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .matmul_cpu import matmul, uses_onednn
from .selection import call_refusal, chosen
from .weight_gradients import WeightGradients, store_for


# With fewer rows reading the weights takes longer than multiplying
FEWEST_ROWS = 16


def tensor_refusal(tensor: torch.Tensor) -> str | None:
    """The reason why `linear` takes no call in a tensor's dtype and on its device, or None."""
    if chosen["linear"] == "torch":
        return "linear is served by 'torch', as chosen"
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return f"is for fp32 on CPUs, not {tensor.dtype} on {tensor.device.type}"
    return None if uses_onednn(tensor) else "is not faster than torch's own on this processor"


def linear_refusal(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """The reason why `linear` does not take a call, or None where it does. Shapes as for `linear`."""
    if torch.compiler.is_compiling():
        return "is opaque to torch.compile"
    if torch.is_autocast_enabled("cpu"):
        return "does not follow autocast"
    if (reason := call_refusal()) is not None:
        return reason
    for tensor, types in ((x, (torch.Tensor,)), (weight, (torch.nn.Parameter, torch.Tensor))):
        if type(tensor) not in types:
            return f"takes plain tensors, not {type(tensor).__name__}"
        if (reason := tensor_refusal(tensor)) is not None:
            return reason
    return f"pays from {FEWEST_ROWS} rows on" if x.numel() < FEWEST_ROWS * x.shape[-1] else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return matmul(x_MK, weight_NK.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x_MK, weight_NK = inputs
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x_MK if needs_weight else None, weight_NK if needs_x else None)

    @staticmethod
    def backward(ctx: Any, g_MN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        # Linear in both, so second derivatives come from here too
        d_x_MK = None if weight_NK is None else _Linear.apply(g_MN, weight_NK.t())
        d_weight_NK = None if x_MK is None else _Linear.apply(g_MN.t(), x_MK.t())
        return d_x_MK, d_weight_NK


class _LinearApart(torch.autograd.Function):
    """The same, whose weight's gradient is put off."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_MK: torch.Tensor, weight_NK: torch.nn.Parameter, store: WeightGradients
    ) -> torch.Tensor:
        ctx.parameter, ctx.store = weight_NK, store
        ctx.save_for_backward(x_MK, weight_NK)
        return matmul(x_MK, weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MN: torch.Tensor) -> tuple:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        parameter = ctx.parameter
        ctx.store.put_off(lambda: [(parameter, matmul(g_MN.t(), x_MK))])
        return (matmul(g_MN, weight_NK) if ctx.needs_input_grad[0] else None), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` `(..., K)` times the transpose of `weight` `(N, K)`, plus `bias` `(N,)`: `(..., N)`, with derivatives."""
    store = store_for(weight)
    x_MK = x.flatten(0, -2)
    y_MN = _Linear.apply(x_MK, weight) if store is None else _LinearApart.apply(x_MK, weight, store)
    y = y_MN.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
