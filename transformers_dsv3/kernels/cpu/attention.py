"""Multi-head latent attention by the compiled CPU backend.

`absorbed_attention` decodes over the latent cache, reading it once for all heads; `expanded_attention` is for prefill,
without copying the shared rotary keys to every head. Both work in blocks with online softmax (arXiv 2205.14135).
"""

import ctypes
from typing import Any

import torch

from ..operators import define
from ..selection import PLAIN, cpu_refusal, mask_refusal
from . import library
from .operators import (
    LONGEST_HEAD,
    TYPES,
    addresses,
    dense_rows,
    out_of_memory,
    refuse_dtype,
    refuse_shape,
    require_storage,
)


def absorbed_refusal(
    q_nope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    """The reason why `absorbed_attention` does not take a call, or None where it does."""
    return (
        weight_refusal(q_nope, None, latent, k_rope, kv_b_weight)
        or mask_refusal(attention_mask)
        or cpu_refusal("attention", q_nope, latent, k_rope)
    )


def weight_refusal(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    *rest: object,
) -> str | None:
    """The part of `absorbed_refusal` that stays the same from call to call."""
    if latent.shape[-1] > LONGEST_HEAD:
        return f"takes latents of {LONGEST_HEAD} at most"
    if not kv_b_weight.is_contiguous():
        return "takes a contiguous kv_b_proj only"
    if kv_b_weight.dtype is torch.int8:
        return "takes kv_b_proj in the activations' dtype"
    return cpu_refusal("attention", q_nope, kv_b_weight)


def cache_refusal(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *rest: object,
) -> str | None:
    """The part of `absorbed_refusal` that changes from call to call: the cache and the mask."""
    for tensor in (latent, k_rope):
        if type(tensor) not in PLAIN or tensor.dtype is not q_nope.dtype or not tensor.is_cpu:
            return cpu_refusal("attention", q_nope, latent, k_rope)
    return None if attention_mask is None else mask_refusal(attention_mask)


def _mask_arguments(mask: torch.Tensor, shape: tuple[int, int, int]) -> tuple:
    """`(mask kept alive, address, is_bytes, strides)` of a mask broadcastable to `(B, 1, Q, S)`."""
    B, Q, S = shape
    if mask.dim() != 4 or any(n not in (1, size) for n, size in zip(mask.shape, (B, 1, Q, S))):
        raise ValueError(f"the mask is of shape {tuple(mask.shape)}, not {(B, 1, Q, S)}")
    require_storage(mask=mask)
    if mask.dtype != torch.bool:
        mask = mask.float()
    mask = mask.expand(B, 1, Q, S)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    strides = (ctypes.c_int64 * 2)(mask.stride(0), mask.stride(2))
    return mask, mask.data_ptr(), mask.dtype == torch.bool, strides


def absorbed_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output `(B, Q, H, V)`; arguments are those of the model's plain `absorbed_attention`.

    Args:
        filled: of a static cache, whose mask says the same here.
    """
    B, H, Q, N = q_nope.shape
    S, R = latent.shape[1:]
    P, V = q_rope.shape[-1], kv_b_weight.shape[0] // H - N
    dtype = q_nope.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        refuse_dtype("q_nope", q_nope)
    for name, tensor, shape in (
        ("q_rope", q_rope, (B, H, Q, P)),
        ("latent", latent, (B, S, R)),
        ("k_rope", k_rope, (B, S, P)),
    ):
        if tensor.shape != shape:
            refuse_shape(name, tensor, shape)
        if tensor.dtype is not dtype:
            raise ValueError("the dtypes of queries and cache differ")
    if (
        kv_b_weight.shape != (H * (N + V), R)
        or kv_b_weight.dtype is not dtype
        or not kv_b_weight.is_contiguous()
        or (kv_b_weight.storage_offset() + kv_b_weight.numel()) * dtype.itemsize
        > kv_b_weight.untyped_storage().nbytes()
    ):
        addresses(q_nope, ("kv_b_weight", kv_b_weight, None, (H * (N + V), R)))  # which says what is wrong
    if R > LONGEST_HEAD or P > LONGEST_HEAD:
        raise ValueError(f"latents or rotary parts are longer than {LONGEST_HEAD}")
    out = q_nope.new_empty(B, Q, H, V)
    (q_nope, q_nope_of), (q_rope, q_rope_of), (latent, latent_of), (k_rope, k_rope_of) = dense_rows(
        q_nope=q_nope, q_rope=q_rope, latent=latent, k_rope=k_rope
    )
    mask, mask_address, is_bytes, mask_strides = (
        (None, None, 0, None) if attention_mask is None else _mask_arguments(attention_mask, (B, Q, S))
    )
    if library.loaded.dsv3_attention_absorbed(
        q_nope.data_ptr(),
        q_nope_of,
        q_rope.data_ptr(),
        q_rope_of,
        latent.data_ptr(),
        latent_of,
        k_rope.data_ptr(),
        k_rope_of,
        kv_b_weight.data_ptr(),
        TYPES[dtype],
        mask_address,
        is_bytes,
        mask_strides,
        -1,
        scaling,
        out.data_ptr(),
        *(B, H, Q, S, N, P, R, V),
        torch.get_num_threads(),
    ):
        out_of_memory()
    return out


def absorbed_attention_operator(*arguments: Any) -> torch.Tensor:
    """`absorbed_attention` by way of PyTorch's dispatcher."""
    return absorbed_operator(*arguments[:7])


def expanded_refusal(
    q_nope: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, attention_mask: Any, dropout: float
) -> str | None:
    """The reason why `expanded_attention` does not take a call, or None where it does."""
    if dropout > 0:
        return "has no dropout"
    if q_nope.shape[-1] > LONGEST_HEAD:
        return f"takes heads of {LONGEST_HEAD} at most"
    if (reason := mask_refusal(attention_mask)) is not None:
        return reason
    return cpu_refusal("attention", q_nope, kv, k_rope)


def expanded_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        q_nope: `(B, H, Q, N)`. q_rope: `(B, H, Q, P)`. k_rope: `(B, S, P)`.
        kv: `(B, S, H, N + V)`, keys and values of each head as `kv_b_proj` gives them.
        attention_mask: boolean or additive, broadcastable to `(B, 1, Q, S)`. None: causal, queries starting at
            position 0, or no mask for a single query.

    Returns:
        `(B, Q, H, V)`.
    """
    causal = attention_mask is None and q_nope.shape[2] > 1
    return expanded_operator(q_nope, q_rope, kv, k_rope, attention_mask, 0 if causal else -1, scaling)


def _expanded(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    first_query: int,
    scaling: float,
) -> torch.Tensor:
    B, H, Q, N = q_nope.shape
    S, V, P = kv.shape[1], kv.shape[3] - N, q_rope.shape[-1]
    dtype = q_nope.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        refuse_dtype("q_nope", q_nope)
    for name, tensor, shape in (
        ("q_rope", q_rope, (B, H, Q, P)),
        ("kv", kv, (B, S, H, N + V)),
        ("k_rope", k_rope, (B, S, P)),
    ):
        if tensor.shape != shape:
            refuse_shape(name, tensor, shape)
        if tensor.dtype is not dtype:
            raise ValueError("the dtypes of queries and keys differ")
    if max(N, P) > LONGEST_HEAD:
        raise ValueError(f"keys are longer than {LONGEST_HEAD}")
    out = q_nope.new_empty(B, Q, H, V)
    (q_nope, q_nope_of), (q_rope, q_rope_of), (kv, kv_of), (k_rope, k_rope_of) = dense_rows(
        q_nope=q_nope, q_rope=q_rope, kv=kv, k_rope=k_rope
    )
    mask, mask_address, is_bytes, mask_strides = (
        (None, None, 0, None) if mask is None else _mask_arguments(mask, (B, Q, S))
    )
    if library.loaded.dsv3_attention_expanded(
        q_nope.data_ptr(),
        q_nope_of,
        q_rope.data_ptr(),
        q_rope_of,
        kv.data_ptr(),
        kv_of,
        k_rope.data_ptr(),
        k_rope_of,
        TYPES[dtype],
        mask_address,
        is_bytes,
        mask_strides,
        first_query,
        scaling,
        out.data_ptr(),
        *(B, H, Q, S, N, P, V),
        torch.get_num_threads(),
    ):
        out_of_memory()
    return out


def _fake_absorbed(q_nope, q_rope, latent, k_rope, kv_b_weight, mask, scaling):  # type: ignore[no-untyped-def]
    B, H, Q, N = q_nope.shape
    return q_nope.new_empty(B, Q, H, kv_b_weight.shape[0] // H - N)


def _fake_expanded(q_nope, q_rope, kv, k_rope, mask, first_query, scaling):  # type: ignore[no-untyped-def]
    B, H, Q, N = q_nope.shape
    return q_nope.new_empty(B, Q, H, kv.shape[3] - N)


absorbed_operator = define(
    "attention_absorbed(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor kv_b_weight, Tensor? mask, "
    "float scaling) -> Tensor",
    absorbed_attention,
    _fake_absorbed,
    "CPU",
)
expanded_operator = define(
    "attention_expanded(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor? mask, int first_query, "
    "float scaling) -> Tensor",
    _expanded,
    _fake_expanded,
    "CPU",
)
