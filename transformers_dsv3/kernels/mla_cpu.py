"""Multi-head latent attention by the compiled CPU backend.

`project` makes queries, latents and rotary keys of hidden states. `absorbed_attention` decodes over the latent cache,
reading it once for all heads; `expanded_attention` is for prefill, without copying the shared rotary keys to every
head. Both work in blocks with online softmax (arXiv 2205.14135).
"""

from typing import Any

import torch
from torch import nn

from .cpu_ops import LONGEST_HEAD, MOST_ROTATED
from .linear_cpu import FEWEST_INT8_ROWS
from .selection import chosen, cpu_refusal, mask_refusal, plain_refusal


PLAIN_PARTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm")


def project_refusal(attention: nn.Module, x: torch.Tensor, cos: torch.Tensor) -> str | None:
    """The reason why `project` does not take a call, or None where it does."""
    weights = []
    for name in PLAIN_PARTS:
        part = attention._modules.get(name)
        if part is None:
            continue
        mark = "is_plain_norm" if name.endswith("norm") else "is_plain_linear"
        if (reason := plain_refusal(name, part, nn.Linear, mark)) is not None:
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
    if len({weight.dtype for weight in weights if weight.dim() == 2}) > 1:
        return "takes weights of one dtype"
    if cos.shape[-1] > MOST_ROTATED:
        return f"rotates {MOST_ROTATED} dimensions at most"
    if chosen["linear"] == "torch":
        return "linear is served by 'torch', as chosen"
    return cpu_refusal("attention", x, cos, *weights)


def project(
    attention: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention needs of each token, in one call where the layers one by one are seven.

    Args:
        attention: has the layers named in `PLAIN_PARTS`, with `q_proj` or the two in its place.
        x: `(B, Q, D)`. cos, sin: `(B or 1, Q, P)`.

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
    query, latent, k_rope = torch.ops.transformers_dsv3.project(
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
        getattr(kv_a, "int8_activations", False) and x.shape[0] * x.shape[1] >= FEWEST_INT8_ROWS,
    )
    return query.transpose(1, 2), latent, k_rope


def absorbed_refusal(
    q_nope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    """The reason why `absorbed_attention` does not take a call, or None where it does."""
    if latent.shape[-1] > LONGEST_HEAD:
        return f"takes latents of {LONGEST_HEAD} at most"
    if not kv_b_weight.is_contiguous():
        return "takes a contiguous kv_b_proj only"
    if kv_b_weight.dtype is torch.int8:
        return "takes kv_b_proj in the activations' dtype"
    if (reason := mask_refusal(attention_mask)) is not None:
        return reason
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
    if (reason := mask_refusal(attention_mask)) is not None:
        return reason
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
