"""Linear layers by the compiled CPU backend: a few rows of activations, bound by reading the weights once.

Rows of bf16 may be as many as they like where the processor has matrix units (AMX), which the backend uses itself.
"""

from typing import Any, NamedTuple

import torch

from ..operators import define
from ..selection import QUANTIZED, cpu_refusal
from . import library
from .operators import (
    TYPES,
    addresses,
    out_of_memory,
    refuse_dtype,
    require_storage,
)


# With more rows PyTorch's own product is as fast in bf16 as the vectors' here, since then arithmetic is the limit. In
# fp32 it is not: on AMD's processors MKL uses half of their vectors.
MOST_BF16_ROWS = 64
# Weights that stay in the processor's second-level cache gain nothing from being streamed, and the call costs more
FEWEST_BYTES = 2**18


class Rows(NamedTuple):
    """Rows up to which weights are better met here, since beyond them PyTorch's own products use faster units.

    Args:
        dense: of one weight. routed: of each expert of a mixture, on average.
    """

    dense: int
    routed: int


def _rows_before_faster_units() -> dict[torch.dtype, Rows]:
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    limits = {}
    if library.has_tiles():
        # Bf16 meets them in tiles, at any number. So do quantised weights, as bf16, which vectors meet in 8 bits
        limits[torch.int8], limits[torch.uint8] = Rows(6, 6), Rows(12, 12)
    elif told.get("amx_bf16") and torch.backends.mkldnn.is_available():
        limits[torch.bfloat16] = Rows(8, 6)
        # Which are turned to bf16 first, see `dequantize`
        limits[torch.int8] = limits[torch.uint8] = Rows(80, 144)
    if told.get("cpu_name", "").startswith("Intel") and torch.backends.mkl.is_available():
        limits[torch.float32] = Rows(32, 12)
    return limits


# By the dtype of weights, what is limited on this processor: its matrix units (AMX) multiply bf16 ten times as fast as
# its vectors do, and MKL has fp32 code that only Intel's processors run
MOST_ROWS = _rows_before_faster_units()


def dense_rows_refusal(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """The reason why the rows of `x` `(..., K)` are too many for dense weights, or None."""
    limit = limit_of_rows(x, weight)
    if limit is not None and x.numel() > limit.dense * x.shape[-1]:
        return f"pays up to {limit.dense} rows of {weight.dtype} on this processor"
    return None


def rounded_rows_refusal(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """The reason why so many rows are not rounded to meet quantised weights, which they meet in tiles; or None."""
    return dense_rows_refusal(x, weight) if library.has_tiles() else None


def limit_of_rows(x: torch.Tensor, weight: torch.Tensor) -> Rows | None:
    """Rows up to which weights are better met here, or None where there is no limit."""
    if weight.dtype in QUANTIZED and x.dtype is not torch.bfloat16:
        return None
    return MOST_ROWS.get(weight.dtype)


def linear_refusal(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> str | None:
    """The reason why `linear` does not take a call, or None where it does. Arguments as for `linear`."""
    return layer_refusal(x, weight, *rest) or rows_refusal(x, weight)


def layer_refusal(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    int8_activations: bool = False,
) -> str | None:
    """The part of `linear_refusal` that stays the same from call to call."""
    if weight.dtype not in QUANTIZED and weight.numel() * weight.element_size() < FEWEST_BYTES:
        return "does not pay for weights this small"
    if not weight.is_contiguous():
        return "takes contiguous weights only"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "has no gradients"
    return cpu_refusal("linear", x, weight)


def rows_refusal(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> str | None:
    """The part of `linear_refusal` that the number of rows decides, which changes from call to call."""
    if x.dtype is torch.bfloat16 and x.numel() > MOST_BF16_ROWS * x.shape[-1] and weight.dtype not in QUANTIZED:
        if not library.has_tiles():
            return f"pays up to {MOST_BF16_ROWS} rows of bf16"
    return dense_rows_refusal(x, weight)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    int8_activations: bool = False,
) -> torch.Tensor:
    """`x` `(..., K)` times the transpose of `weight` `(N, K)`, plus `bias` `(N,)`: `(..., N)`.

    Args:
        scale: fp16 `(N, K / 32)`, for quantised weights; of 4 bits they are uint8 `(N, K / 2)`.
        int8_activations: whether activations are rounded to 8 bits where the weights are quantised.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("x", x)
    N, K = weight.shape
    if weight.dtype is torch.uint8:
        K *= 2
    if x.shape[-1] != K:
        raise ValueError(f"x has rows of {x.shape[-1]}, weight of {K}")
    if weight.dtype is x.dtype and scale is None and weight.is_contiguous():
        address, scale_address = weight.data_ptr(), None
    else:
        address, scale_address = addresses(x, ("weight", weight, scale, (N, K)))  # type: ignore[assignment]
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (N,) or not bias.is_contiguous()):
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}, not contiguous {x.dtype} of ({N},)")
    for tensor in (x, weight):
        if (
            not tensor.is_contiguous()
            or (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > tensor.untyped_storage().nbytes()
        ):
            require_storage(x=x, weight=weight)
    if bias is not None:
        require_storage(bias=bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel():
        status = library.loaded.dsv3_linear(
            x.data_ptr(),
            TYPES[x.dtype],
            K,
            address,
            TYPES[weight.dtype],
            K,
            scale_address,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            N,
            y.numel() // N,
            N,
            K,
            int8_activations,
            torch.get_num_threads(),
        )
        if status:
            out_of_memory()
    return y


def _fake(x, weight, scale, bias, int8_activations):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


operator = define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool int8_activations) -> Tensor",
    linear,
    _fake,
    "CPU",
)
