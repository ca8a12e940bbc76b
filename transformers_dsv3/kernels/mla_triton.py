"""Absorbed attention by programs in Triton, on NVIDIA's and AMD's GPUs, over a latent cache in one piece or in pages.

The programs read the cache where it lies, each latent once for many heads, and no more of it than is filled. Nothing
here waits for the GPU, so that CUDA graphs hold the calls. The two projections into latents and out of them are
batched products of PyTorch's, a batch a head, whose weights are read once for all sequences.
"""

import functools

import torch
from torch import nn

from .operators import define
from .selection import mask_refusal
from .triton_support import on_device, precision, triton_refusal


# More are another program's: with 8 queries and 16 heads each latent is read twice already
MOST_QUERIES = 8
WIDEST_LATENT, WIDEST_ROTARY = 512, 128
# In fp32, where no more shared memory is known of than every GPU has
WIDEST_UNKNOWN_FP32 = 256
# Programs that the interpreter is taken to run at a time, for contexts to be divided there too
INTERPRETED_PLACES = 4


def module_refusal(attention: nn.Module) -> str | None:
    """The reason why no call of an attention module is taken, or None where some are.

    Args:
        attention: has `kv_b_proj`, `kv_lora_rank` and `qk_rope_head_dim`.
    """
    weight = attention.kv_b_proj.weight
    if (reason := _width_refusal(weight, attention.kv_lora_rank, attention.qk_rope_head_dim)) is not None:
        return reason
    return triton_refusal("attention", weight)


def absorbed_refusal(
    q_nope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    """The reason why `absorbed_attention` does not take a call, or None where it does."""
    if (reason := mask_refusal(attention_mask)) is not None:
        return reason
    return _refusal(q_nope, latent, k_rope, kv_b_weight)


def paged_refusal(
    q_nope: torch.Tensor, latent_pages: torch.Tensor, k_rope_pages: torch.Tensor, kv_b_weight: torch.Tensor
) -> str | None:
    """The reason why `paged_attention` does not take a call, or None where it does."""
    size = latent_pages.shape[1]
    if size & (size - 1):
        return f"takes pages of a power of two, not of {size}"
    return _refusal(q_nope, latent_pages, k_rope_pages, kv_b_weight)


def _refusal(
    q_nope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, kv_b_weight: torch.Tensor
) -> str | None:
    if q_nope.shape[2] > MOST_QUERIES:
        return f"takes {MOST_QUERIES} queries of a sequence at most"
    if (reason := _width_refusal(latent, latent.shape[-1], k_rope.shape[-1])) is not None:
        return reason
    if latent.stride(-1) != 1 or k_rope.stride(-1) != 1:
        return "takes caches whose last dimension is contiguous"
    if not kv_b_weight.is_contiguous():
        return "takes a contiguous kv_b_proj only"
    if kv_b_weight.dtype is torch.int8:
        return "takes kv_b_proj in the activations' dtype"
    if torch.is_autocast_enabled(q_nope.device.type):
        return "does not follow autocast"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_nope, latent, k_rope, kv_b_weight)):
        return "has no gradients"
    return triton_refusal("attention", q_nope, latent, k_rope, kv_b_weight)


def _width_refusal(tensor: torch.Tensor, rank: int, rotary: int) -> str | None:
    if rank > WIDEST_LATENT:
        return f"takes latents of {WIDEST_LATENT} at most"
    if rank > WIDEST_UNKNOWN_FP32 and tensor.dtype is torch.float32 and tensor.is_cuda and _is_unknown(tensor.device):
        return f"takes latents of {WIDEST_UNKNOWN_FP32} at most in fp32 on GPUs without tile sizes of their own"
    return f"takes rotary keys of {WIDEST_ROTARY} at most" if rotary > WIDEST_ROTARY else None


@torch.compiler.assume_constant_result
def _is_unknown(device: torch.device) -> bool:
    from .triton_src.tuned import family_of

    return family_of(device) == "default"


def absorbed_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output `(B, Q, H, V)`; arguments are those of the model's plain `absorbed_attention`, and:

    Args:
        attention_mask: a query that may attend nothing gives 0. What no query may attend is not read.
        filled: the number of positions that hold something, from the first on, integer of shape `()` or `(B,)` on the
            cache's device; None for all. Nothing behind them is read.
    """
    return _attention(
        q_nope_BHQN, q_rope_BHQP, latent_BSR, k_rope_BSP, kv_b_weight, attention_mask, filled, None, False, scaling
    )


def paged_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent_pages: torch.Tensor,
    k_rope_pages: torch.Tensor,
    kv_b_weight: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of each sequence's last queries over a cache in pages: `(B, Q, H, V)`.

    Args:
        latent_pages: `(pages, positions of a page, R)`, k_rope_pages: `(pages, positions of a page, P)`.
        pages: int32 `(B, most pages of a sequence)`: the page of its first positions, of the next, and so on. What
            lies behind a sequence's length is not looked at.
        lengths: integer `(B,)`, cached positions, the queries' own included. Each query attends those up to its own;
            all are 0 for a sequence of length 0.
    """
    return _attention(
        q_nope_BHQN, q_rope_BHQP, latent_pages, k_rope_pages, kv_b_weight, None, lengths, pages, True, scaling
    )


def _attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    pages: torch.Tensor | None,
    causal: bool,
    scaling: float,
) -> torch.Tensor:
    B, H, Q, N = q_nope_BHQN.shape
    R = latent.shape[-1]
    w_uk_HNR, w_uv_HVR = kv_b_weight.view(H, -1, R).tensor_split([N], dim=1)
    q_latent_HTR = torch.bmm(q_nope_BHQN.transpose(0, 1).reshape(H, B * Q, N), w_uk_HNR)
    out_HBQR = torch.ops.transformers_dsv3.mla_decode(
        q_latent_HTR.view(H, B, Q, R), q_rope_BHQP, latent, k_rope, mask, lengths, pages, causal, scaling
    )
    out_HTV = torch.bmm(out_HBQR.view(H, B * Q, R), w_uv_HVR.transpose(1, 2))
    return out_HTV.view(H, B, Q, w_uv_HVR.shape[1]).permute(1, 2, 0, 3)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PLACES
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {like.dtype} of {shape}")


def _mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    pages: torch.Tensor | None,
    causal: bool,
    scaling: float,
) -> torch.Tensor:
    from .triton_src import mla_decode

    H, B, Q, R = q_latent.shape
    S = latent.shape[1]
    _check("q_rope", q_rope, (B, H, Q, k_rope.shape[-1]), q_latent)
    _check("latent", latent, (latent.shape[0] if pages is not None else B, S, R), q_latent)
    _check("k_rope", k_rope, (*latent.shape[:2], k_rope.shape[-1]), q_latent)
    if max(Q / MOST_QUERIES, R / WIDEST_LATENT, k_rope.shape[-1] / WIDEST_ROTARY) > 1:
        raise ValueError(f"{Q} queries, latents of {R} or rotary keys of {k_rope.shape[-1]} are too many")
    if pages is not None:
        if lengths is None or pages.dtype != torch.int32 or pages.dim() != 2 or pages.shape[0] != B or S & (S - 1):
            raise ValueError("pages are int32 of (B, most pages), each of a power of two, and come with lengths")
        pages = pages if pages.stride(1) == 1 else pages.contiguous()
        S *= pages.shape[1]
    if mask is not None:
        if mask.dim() != 4 or any(n not in (1, size) for n, size in zip(mask.shape, (B, 1, Q, S))):
            raise ValueError(f"the mask is of shape {tuple(mask.shape)}, not {(B, 1, Q, S)}")
        mask = mask.expand(B, 1, Q, S)[:, 0]
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if lengths is not None:
        lengths = lengths.expand(B)
    if S == 0 or q_latent.numel() == 0:
        return torch.zeros_like(q_latent, memory_format=torch.contiguous_format)
    q_latent, q_rope, latent, k_rope = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, latent, k_rope)
    )
    with on_device(latent):
        return mla_decode.attend(
            q_latent,
            q_rope,
            latent,
            k_rope,
            mask,
            lengths,
            pages,
            causal,
            scaling,
            precision(),
            _processors(latent.device),
        )


def _fake(q_latent: torch.Tensor, *arguments: object) -> torch.Tensor:
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format)


define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor? mask, Tensor? lengths, "
    "Tensor? pages, bool causal, float scaling) -> Tensor",
    _mla_decode,
    _fake,
)
