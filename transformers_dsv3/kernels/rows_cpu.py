"""Normalisation and rotary embedding by the compiled CPU backend: one call where PyTorch takes eight.

In decoding each call costs more than its arithmetic.
"""

import torch

from .cpu_ops import MOST_ROTATED
from .selection import cpu_refusal


def rms_norm_refusal(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """The reason why `torch.ops.transformers_dsv3.rms_norm` does not take a call, or None where it does."""
    return cpu_refusal("linear", x, weight)


def rotate_refusal(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """The reason why `torch.ops.transformers_dsv3.rotate` does not take a call, or None where it does."""
    if x.shape[-1] > MOST_ROTATED:
        return f"rotates {MOST_ROTATED} dimensions at most"
    return cpu_refusal("attention", x, cos, sin)
