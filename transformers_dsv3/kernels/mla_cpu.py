"""Multi-head latent attention by the compiled CPU backend.

`absorbed_attention` decodes over the latent cache, reading it once for all heads; `expanded_attention` is for prefill,
without copying the shared rotary keys to every head. Both work in blocks with online softmax (arXiv 2205.14135).
"""

from typing import Any

import torch

from .cpu_ops import LONGEST_HEAD
from .selection import cpu_refusal


def absorbed_refusal(
    q_nope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, kv_b_weight: torch.Tensor
) -> str | None:
    """The reason why `absorbed_attention` does not take a call, or None where it does."""
    if latent.shape[-1] > LONGEST_HEAD:
        return f"takes latents of {LONGEST_HEAD} at most"
    if not kv_b_weight.is_contiguous():
        return "takes a contiguous kv_b_proj only"
    if kv_b_weight.dtype is torch.int8:
        return "takes kv_b_proj in the activations' dtype"
    return cpu_refusal("attention", q_nope, latent, k_rope, kv_b_weight)


def absorbed_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The output `(B, Q, H, V)`; arguments are those of the model's plain `absorbed_attention`."""
    return torch.ops.transformers_dsv3.attention_absorbed(
        q_nope_BHQN, q_rope_BHQP, latent_BSR, k_rope_BSP, kv_b_weight, attention_mask, scaling
    )


def expanded_refusal(
    q_nope: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, attention_mask: Any, dropout: float
) -> str | None:
    """The reason why `expanded_attention` does not take a call, or None where it does."""
    if dropout > 0:
        return "has no dropout"
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4):
        return "takes masks of (B, 1, Q, S)"
    if q_nope.shape[-1] > LONGEST_HEAD:
        return f"takes heads of {LONGEST_HEAD} at most"
    return cpu_refusal("attention", q_nope, kv, k_rope)


def expanded_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    kv_BSHX: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        kv_BSHX: `(B, S, H, N + V)`, keys and values of each head as `kv_b_proj` gives them.
        attention_mask: boolean or additive, broadcastable to `(B, 1, Q, S)`. None: causal, queries starting at
            position 0, or no mask for a single query.

    Returns:
        `(B, Q, H, V)`.
    """
    causal = attention_mask is None and q_nope_BHQN.shape[2] > 1
    return torch.ops.transformers_dsv3.attention_expanded(
        q_nope_BHQN, q_rope_BHQP, kv_BSHX, k_rope_BSP, attention_mask, 0 if causal else -1, scaling
    )
