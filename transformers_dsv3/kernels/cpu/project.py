"""What attention needs of each token by the compiled CPU backend: queries, latents and rotary keys in one call."""

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..operators import define
from ..selection import chosen, cpu_refusal, plain_refusal
from . import library
from .linear import rounded_rows_refusal
from .operators import (
    MOST_ROTATED,
    TYPES,
    addresses,
    out_of_memory,
    refuse_dtype,
    require_angles,
    require_storage,
)


PLAIN_PARTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm")


def project_refusal(x: torch.Tensor, attention: nn.Module, cos: torch.Tensor, *rest: object) -> str | None:
    """The reason why `project` does not take a call, or None where it does."""
    weights, dtypes = [], set()
    for name in PLAIN_PARTS:
        part = attention._modules.get(name)
        if part is None:
            continue
        kind = "norm" if name.endswith("norm") else "linear"
        if (reason := plain_refusal(name, part, kind)) is not None:
            return reason
        bias = getattr(part, "bias", None)
        if bias is not None:
            if name in ("q_proj", "q_b_proj"):
                return f"takes {name} without bias"
            if bias.requires_grad and torch.is_grad_enabled():
                return "has no gradients"
        weight = part.weight
        if not weight.is_contiguous():
            return f"takes contiguous weights, {name}'s is not"
        weights.append(weight)
        if weight.dim() == 2:
            dtypes.add(weight.dtype)
    if len(dtypes) > 1:
        return "takes weights of one dtype"
    if cos.shape[-1] > MOST_ROTATED:
        return f"rotates {MOST_ROTATED} dimensions at most"
    if chosen["linear"] == "torch":
        return "linear is served by 'torch', as chosen"
    return cpu_refusal("attention", x, cos, *weights)


def _project(
    x: torch.Tensor,
    q_a: torch.Tensor | None,
    q_a_scale: torch.Tensor | None,
    q_a_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    q_eps: float,
    q_b: torch.Tensor,
    q_b_scale: torch.Tensor | None,
    kv_a: torch.Tensor,
    kv_a_scale: torch.Tensor | None,
    kv_a_bias: torch.Tensor | None,
    kv_norm: torch.Tensor,
    kv_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    heads: int,
    int8_activations: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `(B, Q, H, N + P)`, rotated, latents `(B, 1, Q, R)`, rotary keys `(B, 1, Q, P)` of `x` `(B, Q, D)`."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("x", x)
    B, Q, D = x.shape
    R, P = kv_norm.shape[0], cos.shape[-1]
    L = 0 if q_a is None else q_a.shape[0]
    width = q_b.shape[0]
    if q_a is not None and q_norm is None:
        raise ValueError("q_a needs q_norm")
    if (
        cos.shape != (1, Q, P)
        or sin.shape != cos.shape
        or cos.dtype is not x.dtype
        or sin.dtype is not x.dtype
        or P > MOST_ROTATED
        or P % 2
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        cos, sin = require_angles(x, cos, sin, (B, Q, P))
    kv_a_address, kv_a_scale_address, kv_norm_address, _, q_b_address, q_b_scale_address, *low = addresses(
        x,
        ("kv_a", kv_a, kv_a_scale, (R + P, D)),
        ("kv_norm", kv_norm, None, (R,)),
        ("q_b", q_b, q_b_scale, (width, L or D)),
        ("q_a", q_a, q_a_scale, (L, D)),
        ("q_norm", q_norm, None, (L,)),
        ("cos", cos, None, cos.shape),
        ("sin", sin, None, sin.shape),
    )
    if kv_a.dtype != q_b.dtype or (q_a is not None and q_a.dtype != q_b.dtype):
        raise ValueError("the weights are of several dtypes")
    for name, bias, size in (("q_a_bias", q_a_bias, L), ("kv_a_bias", kv_a_bias, R + P)):
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (size,) or not bias.is_contiguous()):
            raise ValueError(
                f"{name} is {bias.dtype} of shape {tuple(bias.shape)}, not contiguous {x.dtype} of ({size},)"
            )
        if bias is not None:
            require_storage(**{name: bias})
    if width % heads or width // heads < P:
        raise ValueError(f"q_b has {width} rows, not a multiple of {heads} heads of at least {P}")
    x = x.contiguous()
    q = x.new_empty(B, Q, heads, width // heads)
    latent, k_rope = x.new_empty(B, 1, Q, R), x.new_empty(B, 1, Q, P)
    if library.loaded.dsv3_project(
        x.data_ptr(),
        TYPES[x.dtype],
        D,
        TYPES[q_b.dtype],
        low[0],
        low[1],
        None if q_a_bias is None else q_a_bias.data_ptr(),
        low[2],
        q_eps,
        L,
        q_b_address,
        q_b_scale_address,
        kv_a_address,
        kv_a_scale_address,
        None if kv_a_bias is None else kv_a_bias.data_ptr(),
        kv_norm_address,
        kv_eps,
        cos.data_ptr(),
        sin.data_ptr(),
        (ctypes.c_int64 * 2)(Q * P if cos.shape[0] > 1 else 0, P),
        interleave,
        *(B, Q, heads, width // heads - P, P, R),
        q.data_ptr(),
        latent.data_ptr(),
        k_rope.data_ptr(),
        int8_activations,
        torch.get_num_threads(),
    ):
        out_of_memory()
    return q, latent, k_rope


def _fake(  # type: ignore[no-untyped-def]
    x, q_a, q_a_scale, q_a_bias, q_norm, q_eps, q_b, q_b_scale, kv_a, kv_a_scale, kv_a_bias, kv_norm, kv_eps, cos, sin,
    interleave, heads, int8_activations,
):  # fmt: skip
    B, Q, _ = x.shape
    return (
        x.new_empty(B, Q, heads, q_b.shape[0] // heads),
        x.new_empty(B, 1, Q, kv_norm.shape[0]),
        x.new_empty(B, 1, Q, cos.shape[-1]),
    )


operator = define(
    "project(Tensor x, Tensor? q_a, Tensor? q_a_scale, Tensor? q_a_bias, Tensor? q_norm, float q_eps, Tensor q_b, "
    "Tensor? q_b_scale, Tensor kv_a, Tensor? kv_a_scale, Tensor? kv_a_bias, Tensor kv_norm, float kv_eps, Tensor cos, "
    "Tensor sin, bool interleave, int heads, bool int8_activations) -> (Tensor, Tensor, Tensor)",
    _project,
    _fake,
    "CPU",
)


def project(
    x: torch.Tensor,
    attention: nn.Module,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = operator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention needs of each token, in one call where the layers one by one are seven.

    Args:
        x: `(B, Q, D)`. cos, sin: `(B or 1, Q, P)`.
        attention: has the layers named in `PLAIN_PARTS`, with `q_proj` or the two in its place.
        kernel: the operator, or what it calls.

    Returns:
        Queries `(B, H, Q, N + P)` and rotary keys `(B, 1, Q, P)`, rotated, and normalised latents `(B, 1, Q, R)`.
    """
    parts = attention._modules
    kv_a, kv_norm = parts["kv_a_proj_with_mqa"], parts["kv_a_layernorm"]
    q_b = parts.get("q_proj")
    low: tuple = (None, None, None, None, 0.0)
    if q_b is None:
        q_a, q_norm, q_b = parts["q_a_proj"], parts["q_a_layernorm"], parts["q_b_proj"]
        low = (q_a.weight, getattr(q_a, "weight_scale", None), q_a.bias, q_norm.weight, q_norm.variance_epsilon)
    query, latent, k_rope = kernel(
        x,
        *low,
        q_b.weight,
        getattr(q_b, "weight_scale", None),
        kv_a.weight,
        getattr(kv_a, "weight_scale", None),
        kv_a.bias,
        kv_norm.weight,
        kv_norm.variance_epsilon,
        cos,
        sin,
        interleave,
        q_b.weight.shape[0] // attention.qk_head_dim,
        # Many rows meet quantised weights as bf16, as they do in other layers
        x.dtype in getattr(kv_a, "rounded_dtypes", ()) and rounded_rows_refusal(x, kv_a.weight) is None,
    )
    return query.transpose(1, 2), latent, k_rope


undispatched = partial(project, kernel=_project)
