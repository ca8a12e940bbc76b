"""Quantised weights times many rows of bf16, where the processor has matrix units (AMX).

These multiply bf16 several times as fast as vectors multiply whole numbers, so that from some rows on it is faster to
turn the weights to bf16. The compiled products do so a few rows of weights at a time, in the first-level cache. Where
the library was built without them, it is one matrix at a time, into memory that is used again, and PyTorch's product.
The weights are rounded to bf16 then, as the models' own would be, and activations are not rounded.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..experts_grouped import forward_pass
from ..operators import define
from ..selection import QUANTIZED, cpu_refusal
from . import library, mixture
from . import linear as products
from .linear import limit_of_rows
from .operators import GROUP, TYPES, addresses


def refusal(x: torch.Tensor, *weights: torch.Tensor) -> str | None:
    """The reason why quantised weights are not turned to the dtype of `x`, or None where they are."""
    for weight in weights:
        if weight.dtype not in QUANTIZED:
            return f"is for quantised weights, not {weight.dtype}"
        if not weight.is_contiguous():
            return "takes contiguous weights only"
        if limit_of_rows(x, weight) is None:
            return f"pays for bf16 on processors with matrix units, not for {x.dtype} on this one"
    return cpu_refusal("linear", x, *weights)


def linear_refusal(
    x: torch.Tensor, weight: torch.Tensor, scale: object = None, bias: torch.Tensor | None = None, *rest: object
) -> str | None:
    """As `refusal`, for `linear`."""
    return refusal(x, weight)


def tiles_refusal() -> str | None:
    """The reason why the library itself has no products on matrix units, or None where it has."""
    return None if library.has_tiles() else "has no products of its own on matrix units here"


def mixture_refusal(x: torch.Tensor, experts: nn.Module | None, weights: object, mlp: nn.Module | None) -> str | None:
    """As `mixture.mixture_refusal`, where matrix units meet quantised weights in the same pass."""
    if (reason := tiles_refusal()) is not None:
        return reason
    if (reason := mixture.mixture_refusal(x, experts, weights, mlp)) is not None:  # type: ignore[arg-type]
        return reason
    return refusal(x, mlp.gate_proj.weight)  # type: ignore[union-attr]


def experts_refusal(x: torch.Tensor, experts: nn.Module, index: object, weights: torch.Tensor) -> str | None:
    """As `refusal`, for `experts`."""
    return refusal(x, experts.gate_up_proj, experts.down_proj)


def _dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    N, K = scale.shape[0], scale.shape[1] * GROUP
    return dequantize_into(values, scale, values.new_empty(N, K, dtype=dtype))


def dequantize_into(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes what quantised weights stand for, rounded to the dtype of `out` `(N, K)`, which is contiguous.

    Args:
        values, scale: as in `operators`, of one matrix.
    """
    address, scale_address = addresses(out, ("values", values, scale, tuple(out.shape)))
    library.loaded.dsv3_dequantize(
        address,
        TYPES[values.dtype],
        scale_address,
        *out.shape,
        TYPES[out.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


operator = define(
    "dequantize(Tensor values, Tensor scale, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda values, scale, dtype: values.new_empty(scale.shape[0], scale.shape[1] * GROUP, dtype=dtype),
    "CPU",
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    int8_activations: bool = False,
) -> torch.Tensor:
    """As `linear.linear`, activations whole."""
    if library.has_tiles():
        return products.operator(x, weight, scale, bias, False)
    return F.linear(x, operator(weight, scale, x.dtype), bias)


class _OneAtATime:
    """The matrices of stacked quantised weights `(E, N, K)`, each of which is gone when the next is asked for."""

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self.values, self.scale = values, scale
        self.shape = (*scale.shape[:2], scale.shape[2] * GROUP)
        self.room = values.new_empty(self.shape[1:], dtype=dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return dequantize_into(self.values[expert], self.scale[expert], self.room)


def experts(x: torch.Tensor, experts: nn.Module, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `mixture.routed`, activations whole."""
    if library.has_tiles():
        return mixture.routed(x, experts, index, weights, _whole)
    gate_up, down = (
        _OneAtATime(getattr(experts, name), getattr(experts, f"{name}_scale"), x.dtype)
        for name in ("gate_up_proj", "down_proj")
    )
    # What it asks of weights are their shapes, and one matrix after another
    return forward_pass(x, index, weights, gate_up, down, x.dtype, keep=False)[0]  # type: ignore[arg-type]


def _whole(*arguments: Any) -> torch.Tensor:
    """The operator of mixtures, whose last argument is whether activations are rounded."""
    return mixture.operator(*arguments[:-1], False)  # type: ignore[no-any-return]


whole_mixture = partial(mixture.mixture, kernel=_whole)
whole_mlp = partial(mixture.mlp, kernel=_whole)
