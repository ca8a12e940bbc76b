"""Linear layers by the compiled CPU backend: a few rows of activations, bound by reading the weights once."""

import torch

from . import cpu_ops  # noqa: F401  (defines the operators)
from .selection import cpu_refusal


# With more rows PyTorch's own product is as fast in bf16, since then arithmetic is the limit. In fp32 it is not: on
# AMD's processors MKL uses half of their vectors.
MOST_BF16_ROWS = 64
# Weights that stay in the processor's second-level cache gain nothing from being streamed, and the call costs more
FEWEST_BYTES = 2**18
# Where 8-bit activations are asked for, fewer rows than this have 16 bits all the same: reading the weights is the
# limit then, and more bits are free.
FEWEST_INT8_ROWS = 16


def linear_refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """The reason why `linear` does not take a call, or None where it does."""
    if weight.dtype is not torch.int8:
        if weight.numel() * weight.element_size() < FEWEST_BYTES:
            return "does not pay for weights this small"
        if x.dtype is torch.bfloat16 and x.numel() > MOST_BF16_ROWS * x.shape[-1]:
            return f"pays up to {MOST_BF16_ROWS} rows of bf16"
    if not weight.is_contiguous():
        return "takes contiguous weights only"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "has no gradients"
    return cpu_refusal("linear", x, weight)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    int8_activations: bool = False,
) -> torch.Tensor:
    """`x` `(..., K)` times the transpose of `weight` `(N, K)`, plus `bias` `(N,)`.

    Args:
        scale: fp32 `(N,)`, for INT8 weights.
        int8_activations: whether many rows of activations are rounded to 8 bits where the weights are INT8.
    """
    int8_activations = int8_activations and x.numel() >= FEWEST_INT8_ROWS * x.shape[-1]
    return torch.ops.transformers_dsv3.linear(x, weight, scale, bias, int8_activations)
