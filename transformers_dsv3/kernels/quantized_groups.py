"""Weights of whole numbers in groups of 32 with a scale each: what they stand for, and products that train adapters.

The layout is that of `cpu/operators.py`. Gradients are those of the activations, since the weights are frozen; the
backward pass dequantises a matrix anew instead of keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import selection
from .cpu import dequantize as compiled
from .cpu.operators import GROUP


def whole_numbers(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers int8 `(..., N, K)` of values as they are stored: the same, or uint8 `(..., N, K / 2)`."""
    if values.dtype != torch.uint8:
        return values
    pairs = values.unflatten(-1, (-1, GROUP // 2))
    return (torch.cat([pairs & 15, pairs >> 4], dim=-1).view(torch.int8) - 8).flatten(-2)


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What quantised weights stand for, `(..., N, K)`, rounded to a dtype.

    Args:
        values: int8 `(..., N, K)` or uint8 `(..., N, K / 2)`. scale: fp16 `(..., N, K / 32)`.
    """
    if values.dim() == 2 and _compiled_refusal(values, scale, dtype) is None:
        return compiled.operator(values, scale, dtype)  # type: ignore[no-any-return]
    whole = whole_numbers(values).unflatten(-1, (-1, GROUP))
    return (whole * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


@torch.no_grad()
def _compiled_refusal(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> str | None:
    if not values.is_cpu or not values.is_contiguous() or not scale.is_contiguous() or scale.dtype != torch.float16:
        return "takes contiguous weights with scales of fp16"
    if selection.chosen["linear"] not in ("auto", "cpu"):
        return "was not chosen"
    return selection._cpu_refusal(torch.empty(0, dtype=dtype), values)


class _Product(torch.autograd.Function):
    """`x @ weight.T` of a quantised weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype
        return F.linear(x, dequantize(values, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        values, scale = ctx.saved_tensors
        return (grad @ dequantize(values, scale, grad.dtype)).to(ctx.dtype), None, None


def packed_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`(..., K)` to `(..., N)` by a quantised weight `(N, K)`, in PyTorch's own products, with gradients of x."""
    if not torch.is_grad_enabled() or not x.requires_grad or selection.call_refusal() is not None:
        return F.linear(x, dequantize(values, scale, x.dtype), bias)
    y = _Product.apply(x, values, scale)
    return y if bias is None else y + bias


class QuantizedStack:
    """Quantised matrices `(E, N, K)`, for loops that take the matrix of an expert by its number.

    Args:
        values, scale: as `dequantize` takes them, of all experts.
        dtype: of the matrices that are given.
    """

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self.values, self.scale, self.dtype = values, scale, dtype
        self.shape = torch.Size((*scale.shape[:2], scale.shape[2] * GROUP))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return dequantize(self.values[expert], self.scale[expert], self.dtype)

    def product(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`(N, K)` rows times an expert's matrix, with gradients of x."""
        return packed_linear(x, self.values[expert], self.scale[expert])


def stack_of(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor | QuantizedStack:
    """The weights of experts of one name, `gate_up_proj` or `down_proj`; quantised ones as what gives matrices."""
    weight = getattr(module, name)
    scale = getattr(module, f"{name}_scale", None)
    return weight if scale is None else QuantizedStack(weight, scale, dtype)
