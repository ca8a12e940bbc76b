"""Expanded attention with gradients on a CPU, by products of one head's block of queries with all its keys.

PyTorch's fused attention takes fp32 products to MKL (see `matmul_cpu`), and needs values padded to the keys' width and
the shared rotary keys copied to every head. This reads the parts where they are and writes gradients in place.
Probabilities are computed again in the backward pass.

Scores and their gradients are fp32 (fp64 for fp64), as in PyTorch's fused attention; the other products take their
factors rounded to the inputs' dtype and are summed in fp32.

Shape suffixes: B batch, Q queries, S keys, H heads, N no-position dims of a head, P rotary dims of a head, V value
dims of a head, C = N + P, R rows of a block.
"""

import functools
from typing import Any

import torch

from .experts_plain import differentiable_gradients, is_batched
from .matmul_cpu import matmul, uses_onednn
from .selection import call_refusal, chosen, mask_refusal


# Of a causal mask, blocks behind the diagonal are not computed; smaller blocks make slower products
QUERIES = 256
# Products this small occupy a few threads; PyTorch's fused attention divides heads among them
MOST_THREADS = 8


def tensor_refusal(tensor: torch.Tensor) -> str | None:
    """The reason why `expanded_attention` takes no call in a tensor's dtype and on its device, or None."""
    if chosen["attention"] == "torch":
        return "attention is served by 'torch', as chosen"
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"is for fp32 and bf16 on CPUs, not {tensor.dtype} on {tensor.device.type}"
    if not uses_onednn(tensor.new_empty(0, dtype=torch.float32)):
        return "is not faster than torch's own on this processor"
    return f"pays up to {MOST_THREADS} threads" if torch.get_num_threads() > MOST_THREADS else None


def expanded_refusal(
    q_nope_BHQN: torch.Tensor, kv_BSHX: torch.Tensor, k_rope: torch.Tensor, attention_mask: Any, dropout: float
) -> str | None:
    """The reason why `expanded_attention` does not take a call, or None where it does."""
    tensors = (q_nope_BHQN, kv_BSHX, k_rope)
    if torch.compiler.is_compiling():
        return "is opaque to torch.compile"
    if not torch.is_grad_enabled():
        return "is for training"
    if torch.is_autocast_enabled("cpu"):
        return "does not follow autocast"
    if (reason := call_refusal()) is not None:
        return reason
    if dropout > 0:
        return "has no dropout"
    for tensor in tensors:
        if type(tensor) is not torch.Tensor:
            return f"takes plain tensors, not {type(tensor).__name__}"
        if tensor.dtype != kv_BSHX.dtype:
            return "takes queries, keys and values of one dtype"
    if (reason := tensor_refusal(kv_BSHX)) is not None:
        return reason
    if attention_mask is None:
        return None if q_nope_BHQN.shape[2] == kv_BSHX.shape[1] else "needs a mask where keys come before the queries"
    return mask_refusal(attention_mask)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=8)
def _later(R: int) -> torch.Tensor:
    return torch.ones(R, R, dtype=torch.bool, device="cpu").triu(1)


def _probabilities(
    q_QC: torch.Tensor, k_SC: torch.Tensor, mask_QS: torch.Tensor | None, first: int
) -> tuple[torch.Tensor, slice]:
    """Attention probabilities of one block of one head's queries, and the keys they are of.

    Args:
        q_QC: all queries, scaled. first: the block's first.
        mask_QS: boolean (True: may attend) or additive; None is causal.
    """
    rows = slice(first, min(first + QUERIES, q_QC.shape[0]))
    if mask_QS is None:
        scores_RS = matmul(q_QC[rows], k_SC[: rows.stop].t())
        scores_RS[:, first:].masked_fill_(_later(rows.stop - first), float("-inf"))
        return torch.softmax(scores_RS, dim=-1), rows
    scores_RS = matmul(q_QC[rows], k_SC.t())
    if mask_QS.dtype == torch.bool:
        scores_RS.masked_fill_(~mask_QS[rows], float("-inf"))
    else:
        scores_RS += mask_QS[rows]
    # Queries that may attend nothing (padding) get zeros, as in PyTorch's own
    return torch.ops.aten._safe_softmax(scores_RS, -1), rows


def _plain(
    mask_BHQS: torch.Tensor | None,
    scaling: float,
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    kv_BSHX: torch.Tensor,
    k_rope_BSP: torch.Tensor,
) -> torch.Tensor:
    """`expanded_attention` for all heads at once, derivatives of any order by autograd."""
    B, H, Q, N = q_nope_BHQN.shape
    wide = _wide(kv_BSHX.dtype)
    k_nope_BHSN, v_BHSV = kv_BSHX.transpose(1, 2).to(wide).split([N, kv_BSHX.shape[-1] - N], dim=-1)
    scores_BHQS = q_nope_BHQN.to(wide) @ k_nope_BHSN.transpose(2, 3)
    scores_BHQS = (scores_BHQS + q_rope_BHQP.to(wide) @ k_rope_BSP.to(wide).transpose(1, 2).unsqueeze(1)) * scaling
    if mask_BHQS is None:
        scores_BHQS = scores_BHQS.masked_fill(_later(Q), float("-inf"))
    elif mask_BHQS.dtype == torch.bool:
        # Queries that may attend nothing get zeros, as in `_probabilities`
        scores_BHQS = scores_BHQS.masked_fill(~mask_BHQS, torch.finfo(wide).min)
        attends_BHQ1 = mask_BHQS.any(dim=-1, keepdim=True)
        return ((scores_BHQS.softmax(dim=-1) * attends_BHQ1) @ v_BHSV).transpose(1, 2).to(kv_BSHX.dtype)
    else:
        scores_BHQS = scores_BHQS + mask_BHQS
    return (scores_BHQS.softmax(dim=-1) @ v_BHSV).transpose(1, 2).to(kv_BSHX.dtype)


class _ExpandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_nope_BHQN: torch.Tensor,
        q_rope_BHQP: torch.Tensor,
        kv_BSHX: torch.Tensor,
        k_rope_BSP: torch.Tensor,
        mask_BHQS: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        B, H, Q, N = q_nope_BHQN.shape
        out_BQHV = kv_BSHX.new_empty(B, Q, H, kv_BSHX.shape[-1] - N)
        wide = _wide(kv_BSHX.dtype)
        for b in range(B):
            for h in range(H):
                q_QC = torch.cat([q_nope_BHQN[b, h], q_rope_BHQP[b, h]], dim=-1).to(wide) * scaling
                k_SC = torch.cat([kv_BSHX[b, :, h, :N], k_rope_BSP[b]], dim=-1).to(wide)
                v_SV = kv_BSHX[b, :, h, N:].contiguous()
                mask_QS = None if mask_BHQS is None else mask_BHQS[b, h]
                for first in range(0, Q, QUERIES):
                    p_RS, rows = _probabilities(q_QC, k_SC, mask_QS, first)
                    matmul(p_RS.to(v_SV.dtype), v_SV[: p_RS.shape[1]], out=out_BQHV[b, rows, h])
        ctx.save_for_backward(q_nope_BHQN, q_rope_BHQP, kv_BSHX, k_rope_BSP, mask_BHQS)
        ctx.scaling = scaling
        return out_BQHV

    @staticmethod
    def backward(ctx: Any, grad_BQHV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_nope_BHQN, q_rope_BHQP, kv_BSHX, k_rope_BSP, mask_BHQS = ctx.saved_tensors
        # The gradients are to be differentiated themselves, or there are several at once (`is_grads_batched`)
        if torch.is_grad_enabled() or is_batched(grad_BQHV):
            plain = functools.partial(_plain, mask_BHQS, ctx.scaling)
            inputs = (q_nope_BHQN, q_rope_BHQP, kv_BSHX, k_rope_BSP)
            return *differentiable_gradients(plain, inputs, ctx.needs_input_grad[:4], grad_BQHV), None, None
        B, H, Q, N = q_nope_BHQN.shape
        dtype, wide = kv_BSHX.dtype, _wide(kv_BSHX.dtype)
        d_q_nope_BHQN = q_nope_BHQN.new_empty(q_nope_BHQN.shape)
        d_q_rope_BHQP = q_rope_BHQP.new_empty(q_rope_BHQP.shape)
        d_kv_BSHX = kv_BSHX.new_empty(kv_BSHX.shape)
        d_k_rope_BSP = k_rope_BSP.new_zeros(k_rope_BSP.shape, dtype=wide)
        for b in range(B):
            for h in range(H):
                q_QC = torch.cat([q_nope_BHQN[b, h], q_rope_BHQP[b, h]], dim=-1)
                k_SC = torch.cat([kv_BSHX[b, :, h, :N], k_rope_BSP[b]], dim=-1)
                scaled_QC, k_wide_SC = q_QC.to(wide) * ctx.scaling, k_SC.to(wide)
                v_SV = kv_BSHX[b, :, h, N:].to(wide).contiguous()
                mask_QS = None if mask_BHQS is None else mask_BHQS[b, h]
                d_k_SC, d_v_SV = torch.zeros_like(k_wide_SC), torch.zeros_like(v_SV)
                for first in range(0, Q, QUERIES):
                    p_RS, rows = _probabilities(scaled_QC, k_wide_SC, mask_QS, first)
                    keys = p_RS.shape[1]
                    g_RV = grad_BQHV[b, rows, h].contiguous()
                    d_v_SV[:keys] += matmul(p_RS.to(dtype).t(), g_RV)
                    d_p_RS = matmul(g_RV.to(wide), v_SV[:keys].t())
                    d_s_RS = torch._softmax_backward_data(d_p_RS, p_RS, -1, wide).to(dtype)
                    d_q_RC = matmul(d_s_RS, k_SC[:keys]).mul_(ctx.scaling)
                    d_q_nope_BHQN[b, h, rows], d_q_rope_BHQP[b, h, rows] = d_q_RC[:, :N], d_q_RC[:, N:]
                    d_k_SC[:keys] += matmul(d_s_RS.t(), q_QC[rows])
                d_k_SC *= ctx.scaling
                d_kv_BSHX[b, :, h, :N], d_kv_BSHX[b, :, h, N:] = d_k_SC[:, :N], d_v_SV
                d_k_rope_BSP[b] += d_k_SC[:, N:]
        return d_q_nope_BHQN, d_q_rope_BHQP, d_kv_BSHX, d_k_rope_BSP.to(dtype), None, None


def expanded_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    kv_BSHX: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention over keys and values made from the latents, with first derivatives.

    Args:
        kv_BSHX: `(B, S, H, N + V)`, keys without positions and values.
        k_rope_BSP: rotated keys shared by all heads.
        attention_mask: boolean (True: may attend) or additive, broadcastable to `(B, H, Q, S)`; None is causal, for as
            many keys as queries.

    Returns:
        `(B, Q, H, V)`.
    """
    B, H, Q, _ = q_nope_BHQN.shape
    mask_BHQS = None if attention_mask is None else attention_mask.expand(B, H, Q, kv_BSHX.shape[1])
    return _ExpandedAttention.apply(q_nope_BHQN, q_rope_BHQP, kv_BSHX, k_rope_BSP, mask_BHQS, scaling)
