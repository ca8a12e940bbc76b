"""Normalisation, rotary embedding and the write to the latent cache by programs in Triton: one launch where PyTorch
takes eight or more.

In decoding a launch costs more than its arithmetic. Under `torch.compile` the compiler joins norms with what is around
them, which is better still; the write to the cache it does not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .operators import define
from .selection import bypass_refusal, is_plain
from .triton_support import on_device, triton_refusal


WIDEST = 16384  # a program holds a row


def rms_norm_refusal(x: torch.Tensor, weight: torch.Tensor, eps: float = 0.0) -> str | None:
    """The reason why `torch.ops.transformers_dsv3.rms_norm_triton` does not take a call, or None where it does."""
    if torch.compiler.is_compiling():
        return "leaves norms to the compiler, which joins them with what is around"
    if x.shape[-1] > WIDEST:
        return f"takes rows of {WIDEST} at most"
    return _refusal("linear", x, weight)


def latent_rows_refusal(
    kv_a: torch.Tensor, norm: nn.Module, q_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: object
) -> str | None:
    """The reason why `latent_rows` does not take a call, or None where it does."""
    if not is_plain(type(norm), "norm"):
        return f"takes plain norms, not a {type(norm).__name__}"
    if (reason := bypass_refusal("kv_a_layernorm", norm)) is not None:
        return reason
    if kv_a.shape[-1] > WIDEST:
        return f"takes rows of {WIDEST} at most"
    return _refusal("attention", kv_a, norm.weight, q_rope, cos, sin)


def _refusal(operation: str, x: torch.Tensor, *others: torch.Tensor) -> str | None:
    if (reason := triton_refusal(operation, x, *others)) is not None:
        return reason
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        return "has no gradients"
    return None


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}, "
            f"not dense rows of {like.dtype} of {shape}"
        )


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from .triton_src import rows

    D = x.shape[-1]
    _check("weight", weight, (D,), x)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device(x):
        return rows.rms_norm(x.contiguous().view(-1, D), weight, eps).view(x.shape)


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _latent_rows(
    kv_a: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    q_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    position: torch.Tensor | None,
    start: int,
) -> torch.Tensor:
    from .triton_src import rows

    B, H, Q, P = q_rope.shape
    S, R = latent.shape[2:]
    _check("kv_a", kv_a, (B, Q, R + P), kv_a)
    _check("norm", norm, (R,), kv_a)
    _check("q_rope", q_rope, (B, H, Q, P), kv_a)
    for name, angles in (("cos", cos), ("sin", sin)):
        _check(name, angles, (B if angles.shape[0] > 1 else 1, Q, P), kv_a)
    _check("latent", latent, (B, 1, S, R), kv_a)
    _check("k_rope", k_rope, (B, 1, S, P), kv_a)
    if P % 2 or start < 0 or (position is None and start + Q > S) or cos.stride() != sin.stride():
        raise ValueError(f"{P} rotary dims, {Q} tokens from {start} on in a cache of {S}: do not fit")
    q_out = torch.empty_like(q_rope, memory_format=torch.contiguous_format)
    if B * Q == 0:
        return q_out
    with on_device(kv_a):
        return rows.latent_rows(
            kv_a.reshape(B * Q, -1),
            norm,
            eps,
            q_rope,
            cos.expand(B, Q, P),
            sin.expand(B, Q, P),
            interleave,
            latent[:, 0],
            k_rope[:, 0],
            position,
            start,
        )


def _latent_rows_fake(
    kv_a: torch.Tensor, norm: torch.Tensor, eps: float, q_rope: torch.Tensor, *others: object
) -> torch.Tensor:
    return torch.empty_like(q_rope, memory_format=torch.contiguous_format)


rms_norm_operator = define("rms_norm_triton(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_fake)
# Latents `(B, 1, S, R)` and rotary keys `(B, 1, S, P)` of a cache, written from position `start` on, and behind what
# `position` holds, an integer on the device. kv_a: `(B, Q, R + P)`. q_rope: `(B, H, Q, P)`, returned rotated.
define(
    "latent_rows(Tensor kv_a, Tensor norm, float eps, Tensor q_rope, Tensor cos, Tensor sin, bool interleave, "
    "Tensor(a!) latent, Tensor(b!) k_rope, Tensor? position, SymInt start) -> Tensor",
    _latent_rows,
    _latent_rows_fake,
)


def latent_rows(
    kv_a: torch.Tensor,
    norm: nn.Module,
    q_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    next_place: Callable[[], Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Normalises, rotates and caches the latents of new tokens in one launch.

    Args:
        kv_a: `(B, Q, R + P)`, what `kv_a_proj_with_mqa` gives. norm: of the latents.
        q_rope: `(B, H, Q, P)`. cos, sin: `(B or 1, Q, P)`.
        next_place: gives the place in the cache, with `keys`, `values`, `position`, `start` and `take`, or None.

    Returns:
        Rotated queries, and all that the cache holds after it, `(B, 1, S, R)` and `(B, 1, S, P)`; None where the cache
        has no place to write to.
    """
    place = next_place()
    if place is None:
        return None
    q_rope = torch.ops.transformers_dsv3.latent_rows(
        *(kv_a, norm.weight, norm.variance_epsilon, q_rope, cos, sin, interleave),
        *(place.keys, place.values, place.position, place.start),
    )
    return q_rope, *place.take(kv_a.shape[1])
