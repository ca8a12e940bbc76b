"""What decoding does to a few rows between its products: normalisation, rotary embedding, the write to the cache.

Each program takes a row whole, computes in fp32 and rounds where PyTorch's modules do.
"""

import torch
import triton
import triton.language as tl

from .tuned import Specimen


# Heads whose queries one program rotates
HEADS = 16


@triton.jit
def _normalised(x, weight, eps, D: tl.constexpr):
    """RMSNorm of a row in fp32, rounded to the row's dtype before the weight is multiplied, as PyTorch's module is."""
    values = x.to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    return (values.to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def rms_norm_row(out, x, weight, eps, x_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Root mean square normalisation (arXiv 1910.07467). Grid: rows. x: `(rows, D)` by its stride; out is dense."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    values = tl.load(x + row * x_row + d, mask=inside, other=0.0)
    scales = tl.load(weight + d, mask=inside, other=0.0)
    tl.store(out + row * D + d, _normalised(values, scales, eps, D), mask=inside)


# Where a cache that grows is written to changes from step to step, and is not specialised
@triton.jit(do_not_specialize=["start", "S"])
def latent_row(
    latent,
    k_rope,
    q_out,
    kv_a,
    norm,
    q_rope,
    cos,
    sin,
    position,
    eps,
    start,
    S,
    H,
    QUERIES,
    kv_a_row,
    q_rope_b,
    q_rope_h,
    q_rope_q,
    cos_b,
    cos_q,
    latent_b,
    latent_s,
    k_rope_b,
    k_rope_s,
    R: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: tokens, then the latent with the rotary key (0) and blocks of heads (from 1 on).

    Args:
        latent, k_rope: the cache, `(B, S, R)` and `(B, S, P)`, written at `start` and what `position` holds (None: 0).
            Behind S nothing is written.
        q_out: `(B, H, Q, P)`, dense. q_rope: the same by its strides, not rotated.
        kv_a: `(B * Q, R + P)`. norm: `(R,)`. cos, sin: `(B or 1, Q, P)` by their strides.
    """
    token = tl.program_id(0)
    b, q = (token // QUERIES).to(tl.int64), token % QUERIES
    p = tl.arange(0, BLOCK_HALF)
    in_half = p < HALF
    cos_P = tl.load(cos + b * cos_b + q * cos_q + p, mask=in_half, other=0.0).to(tl.float32)
    sin_P = tl.load(sin + b * cos_b + q * cos_q + p, mask=in_half, other=0.0).to(tl.float32)
    # Pairs are neighbours or halves before, halves behind
    first_at = 2 * p if INTERLEAVE else p
    second_at = 2 * p + 1 if INTERLEAVE else p + HALF
    if tl.program_id(1) == 0:
        r = tl.arange(0, BLOCK_R)
        in_R = r < R
        row = kv_a + token.to(tl.int64) * kv_a_row
        values = tl.load(row + r, mask=in_R, other=0.0)
        scales = tl.load(norm + r, mask=in_R, other=0.0)
        first = tl.load(row + R + first_at, mask=in_half, other=0.0).to(tl.float32)
        second = tl.load(row + R + second_at, mask=in_half, other=0.0).to(tl.float32)
        s = start + q
        if position is not None:
            s += tl.load(position).to(tl.int32)
        if s < S:
            at = latent + b * latent_b + s * latent_s
            tl.store(at + r, _normalised(values, scales, eps, R), mask=in_R)
            at = k_rope + b * k_rope_b + s * k_rope_s + p
            tl.store(at, (first * cos_P - second * sin_P).to(k_rope.dtype.element_ty), mask=in_half)
            tl.store(at + HALF, (second * cos_P + first * sin_P).to(k_rope.dtype.element_ty), mask=in_half)
    else:
        h = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        live_HP = (h < H)[:, None] & in_half[None, :]
        from_HP = q_rope + b * q_rope_b + q * q_rope_q + (h * q_rope_h)[:, None]
        first_HP = tl.load(from_HP + first_at[None, :], mask=live_HP, other=0.0).to(tl.float32)
        second_HP = tl.load(from_HP + second_at[None, :], mask=live_HP, other=0.0).to(tl.float32)
        cos_HP, sin_HP = cos_P[None, :], sin_P[None, :]
        to_HP = q_out + ((b * H + h) * QUERIES + q)[:, None] * (2 * HALF) + p[None, :]
        tl.store(to_HP, (first_HP * cos_HP - second_HP * sin_HP).to(q_out.dtype.element_ty), mask=live_HP)
        tl.store(to_HP + HALF, (second_HP * cos_HP + first_HP * sin_HP).to(q_out.dtype.element_ty), mask=live_HP)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`(rows, D)` by its stride to dense `(rows, D)`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, D = x.shape
    rms_norm_row[(rows,)](
        out, x, weight, eps, x.stride(0), D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=_warps(D)
    )
    return out


def latent_rows(
    kv_a_TX: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    q_rope_BHQP: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    position: torch.Tensor | None,
    start: int,
) -> torch.Tensor:
    """Launches `latent_row` on tensors that were checked; the rotated queries `(B, H, Q, P)`."""
    B, H, Q, P = q_rope_BHQP.shape
    R = latent_BSR.shape[-1]
    q_out = torch.empty_like(q_rope_BHQP, memory_format=torch.contiguous_format)
    latent_row[(B * Q, 1 + triton.cdiv(H, HEADS))](
        latent_BSR,
        k_rope_BSP,
        q_out,
        kv_a_TX,
        norm,
        q_rope_BHQP,
        cos,
        sin,
        position,
        eps,
        start,
        latent_BSR.shape[1],
        H,
        Q,
        kv_a_TX.stride(0),
        *q_rope_BHQP.stride()[:3],
        *cos.stride()[:2],
        *latent_BSR.stride()[:2],
        *k_rope_BSP.stride()[:2],
        R=R,
        HALF=P // 2,
        INTERLEAVE=interleave,
        BLOCK_R=triton.next_power_of_2(R),
        BLOCK_HALF=triton.next_power_of_2(P // 2),
        HEADS=HEADS,
        num_warps=4,
    )
    return q_out


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def specimens(family: str) -> list[Specimen]:
    """Both programs for Moonlight's and DeepSeek-V3's layers."""
    found = []
    for width in (2048, 7168):
        signature = {"out": "*bf16:16", "x": "*bf16:16", "weight": "*bf16:16", "eps": "fp32", "x_row": "i32:16"}
        constants = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
        options = {"num_warps": _warps(width)}
        found.append(Specimen(f"rms_norm_row, {width}, bf16", rms_norm_row, signature, constants, options))
    values = ("latent", "k_rope", "q_out", "kv_a", "norm", "q_rope", "cos", "sin")
    strides = ("kv_a_row", "q_rope_b", "q_rope_h", "q_rope_q", "cos_b", "cos_q", "latent_b", "latent_s")
    constants = {"R": 512, "HALF": 32, "INTERLEAVE": True, "BLOCK_R": 512, "BLOCK_HALF": 32, "HEADS": HEADS}
    for label, dtype, place in (("static cache", "bf16", {"position": "*i64:16"}), ("growing cache", "fp16", {})):
        signature = {
            **dict.fromkeys(values, f"*{dtype}:16"),
            **place,
            "eps": "fp32",
            **dict.fromkeys(("start", "S", "QUERIES"), "i32"),
            **dict.fromkeys(("H", *strides, "k_rope_b", "k_rope_s"), "i32:16"),
        }
        known = {**constants, **({} if place else {"position": None})}
        found.append(Specimen(f"latent_row, {label}, {dtype}", latent_row, signature, known, {"num_warps": 4}))
    return found
