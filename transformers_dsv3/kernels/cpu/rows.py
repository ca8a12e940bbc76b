"""Normalisation and rotary embedding by the compiled CPU backend: one call where PyTorch takes eight.

In decoding each call costs more than its arithmetic.
"""

import ctypes

import torch

from ..operators import define
from ..selection import cpu_refusal
from . import library
from .operators import (
    MOST_ROTATED,
    TYPES,
    dense_rows,
    fake_like,
    out_of_memory,
    refuse_dtype,
    refuse_shape,
    require_angles,
    require_storage,
)


def rms_norm_refusal(x: torch.Tensor, weight: torch.Tensor, eps: float = 0.0) -> str | None:
    """The reason why `rms_norm` does not take a call, or None where it does."""
    if not weight.is_contiguous():
        return "takes contiguous weights only"
    return cpu_refusal("linear", x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` `(..., D)` over the root of its mean square, times `weight` `(D,)` of its dtype: `(..., D)`."""
    dtype, n = x.dtype, x.shape[-1]
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        refuse_dtype("x", x)
    if weight.shape != (n,):
        refuse_shape("weight", weight, (n,))
    if weight.dtype is not dtype:
        raise ValueError(f"weight is {weight.dtype}, the activations are {dtype}")
    if not weight.is_contiguous():
        raise ValueError("weight is not contiguous")
    for tensor in (x, weight):
        if (
            not tensor.is_contiguous()
            or (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > tensor.untyped_storage().nbytes()
        ):
            require_storage(x=x, weight=weight)
    if x.dim() == 3 and x.shape[0] == 1 and x.stride(2) == 1:
        row = x.stride(1)  # a part of wider rows, as the latents are of their projection
    else:
        x, row = x.contiguous(), n
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() and library.loaded.dsv3_rms_norm(
        x.data_ptr(),
        TYPES[dtype],
        row,
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        y.numel() // n,
        n,
        torch.get_num_threads(),
    ):
        out_of_memory()
    return y


def rotate_refusal(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = True) -> str | None:
    """The reason why `rotate` does not take a call, or None where it does."""
    if x.shape[-1] > MOST_ROTATED:
        return f"rotates {MOST_ROTATED} dimensions at most"
    return cpu_refusal("attention", x, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """`x` `(B, H, Q, P)` rotated by angles `(B or 1, Q, P)`; pairs are neighbours or halves of x, halves of y."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("x", x)
    B, H, Q, P = x.shape
    cos, sin = require_angles(x, cos, sin, (B, Q, P))
    ((x, x_strides),) = dense_rows(x=x)
    y = x.new_empty(B, H, Q, P)
    library.loaded.dsv3_rotate(
        x.data_ptr(),
        x_strides,
        cos.data_ptr(),
        sin.data_ptr(),
        (ctypes.c_int64 * 2)(Q * P if cos.shape[0] > 1 else 0, P),
        TYPES[x.dtype],
        interleave,
        y.data_ptr(),
        (ctypes.c_int64 * 3)(H * Q * P, Q * P, P),
        *(B, H, Q, P),
        torch.get_num_threads(),
    )
    return y


rms_norm_operator = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, fake_like, "CPU")
rotate_operator = define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool interleave) -> Tensor", rotate, fake_like, "CPU"
)
