"""Experts with low-rank adapters, without building a delta of the weights' size, forward or backward.

An adapted weight is `W + B A` for each expert. PEFT adds `B A` to the whole stack of weights at every pass and asks
for the stack's gradient, of which the adapter needs two thin projections. Here the adapter is applied to the tokens
that chose an expert, `W x + B (A x)`, and only the adapter's own gradients are computed.

Shape suffixes: T tokens, K experts chosen a token, E experts, S = T * K pairs of token and expert, sorted by expert,
N pairs of one expert, D hidden size, I width of an expert, R rank. `w` is a mixing weight.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .experts_grouped import ROWS, expert_segments, is_silu
from .experts_plain import LowRank, accumulator_dtype, differentiable_gradients, is_batched, plain_experts
from .matmul_cpu import matmul
from .public_kernels import grouped_mm_refusal
from .quantized_groups import QuantizedStack, stack_of
from .selection import QUANTIZED


def plain_low_rank_experts(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: LowRank | None,
    down: LowRank | None,
) -> torch.Tensor:
    """The reference: a plain loop over experts, gradients by autograd.

    Arguments as [`low_rank_experts`]."""
    quantized = module.gate_up_proj.dtype in QUANTIZED
    dtype = _dtype_of_products(hidden_states) if quantized else module.gate_up_proj.dtype
    weights = (stack_of(module, "gate_up_proj", dtype), stack_of(module, "down_proj", dtype))
    return plain_experts(hidden_states, top_k_index, top_k_weights, *weights, dtype, module.act_fn, gate_up, down)


class _CpuExperts(torch.autograd.Function):
    """The loop of `experts_grouped` with low-rank terms, for frozen weights, quantised or not.

    As there, rows behind an expert's own make its products whole multiples of `ROWS`: their results are not used, and
    in sums over an expert's pairs they are zero.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # so that autocast is off in the backward pass too
    def forward(ctx, hidden_TD, index_TK, w_TK, gate_up, gate_up_scale, down, down_scale, a1, b1, a2, b2, dtype):  # type: ignore[no-untyped-def]
        gate_up_EID, down_EDI = _stack(gate_up, gate_up_scale, dtype), _stack(down, down_scale, dtype)
        I = down_EDI.shape[2]
        accumulator = accumulator_dtype(dtype)
        keep = any(ctx.needs_input_grad)
        experts, pairs_S = index_TK.flatten().sort(stable=True)
        counts_E = torch.bincount(experts, minlength=len(down_EDI))[: len(down_EDI)]
        tokens, w_S = _padded_pairs(pairs_S, w_TK, accumulator)
        kept_SI = hidden_TD.new_empty((len(tokens) if keep else 0, 2 * I), dtype=dtype)
        out_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=accumulator)
        for expert, start, count, rows in expert_segments(counts_E):
            x_ND = hidden_TD.index_select(0, tokens[start : start + rows]).to(dtype)
            gate_up_NI = matmul(x_ND, gate_up_EID[expert].to(dtype).t())
            if a1 is not None:
                gate_up_NI.addmm_(torch.mm(x_ND, a1[expert].t()), b1[expert].t())
            if keep:
                kept_SI[start : start + rows] = gate_up_NI  # rows past the expert's own are overwritten by the next
            gate_up_NI = gate_up_NI.to(accumulator)
            act_NI = F.silu(gate_up_NI[:, :I]).mul_(gate_up_NI[:, I:]).mul_(w_S[start : start + rows, None]).to(dtype)
            y_ND = matmul(act_NI, down_EDI[expert].to(dtype).t())
            if a2 is not None:
                y_ND.addmm_(torch.mm(act_NI, a2[expert].t()), b2[expert].t())
            out_TD.index_add_(0, tokens[start : start + count], y_ND[:count].to(accumulator))
        ctx.dtype = dtype
        ctx.save_for_backward(
            *(index_TK, hidden_TD, w_TK, gate_up, gate_up_scale, down, down_scale),
            *(a1, b1, a2, b2, kept_SI, pairs_S, counts_E),
        )
        return out_TD.to(hidden_TD.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        index_TK, *saved = ctx.saved_tensors
        # The gradients are to be differentiated themselves, or there are several at once (`is_grads_batched`)
        if torch.is_grad_enabled() or is_batched(grad_TD):
            needs = ctx.needs_input_grad
            weights = (_stack(saved[2], saved[3], ctx.dtype), _stack(saved[4], saved[5], ctx.dtype))
            d_hidden, d_w, *d_factors = differentiable_gradients(
                partial(_plain_with_factors, index_TK, *weights, ctx.dtype),
                (*saved[:2], *saved[6:10]),
                (needs[0], needs[2], *needs[7:11]),
                grad_TD,
            )
            return d_hidden, None, d_w, None, None, None, None, *d_factors, None
        hidden_TD, w_TK, gate_up, gate_up_scale, down, down_scale, a1, b1, a2, b2, kept_SI, pairs_S, counts_E = saved
        dtype = ctx.dtype
        gate_up_EID, down_EDI = _stack(gate_up, gate_up_scale, dtype), _stack(down, down_scale, dtype)
        I = down_EDI.shape[2]
        accumulator = accumulator_dtype(dtype)
        needs_hidden, _, needs_w = ctx.needs_input_grad[:3]
        tokens, w_S = _padded_pairs(pairs_S, w_TK, accumulator)
        d_hidden_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=accumulator) if needs_hidden else None
        d_w = w_TK.new_zeros(w_TK.numel()) if needs_w else None
        d_a1, d_b1, d_a2, d_b2 = (None if x is None else torch.zeros_like(x) for x in (a1, b1, a2, b2))
        for expert, start, count, rows in expert_segments(counts_E):
            w_N1 = w_S[start : start + rows, None]
            g_ND = grad_TD.index_select(0, tokens[start : start + rows]).to(dtype)
            gate_up_NI = kept_SI[start : start + rows].to(accumulator, copy=True)
            g_ND[count:] = 0
            gate_up_NI[count:] = 0
            gate_NI, up_NI = gate_up_NI[:, :I], gate_up_NI[:, I:]
            silu_NI = F.silu(gate_NI)
            act_NI = silu_NI * up_NI
            d_act_NI = matmul(g_ND, down_EDI[expert].to(dtype))
            if a2 is not None and d_a2 is not None and d_b2 is not None:
                weighted_NI = (act_NI * w_N1).to(dtype)
                back_NR = torch.mm(g_ND, b2[expert])
                torch.mm(g_ND.t(), torch.mm(weighted_NI, a2[expert].t()), out=d_b2[expert])
                torch.mm(back_NR.t(), weighted_NI, out=d_a2[expert])
                d_act_NI.addmm_(back_NR, a2[expert])
            d_act_NI = d_act_NI.to(accumulator)
            if d_w is not None:
                d_w[pairs_S[start : start + count]] = act_NI.mul_(d_act_NI).sum(dim=1)[:count].to(d_w.dtype)
            if a1 is None and d_hidden_TD is None:
                continue
            d_act_NI.mul_(w_N1)
            d_gate_up_NI = torch.empty_like(gate_up_NI, dtype=dtype)
            d_gate_up_NI[:, I:] = silu_NI.mul_(d_act_NI)
            d_gate_up_NI[:, :I] = torch.ops.aten.silu_backward(d_act_NI.mul_(up_NI), gate_NI)
            back_NR = None
            if a1 is not None and d_a1 is not None and d_b1 is not None:
                x_ND = hidden_TD.index_select(0, tokens[start : start + rows]).to(dtype)
                x_ND[count:] = 0
                back_NR = torch.mm(d_gate_up_NI, b1[expert])
                torch.mm(d_gate_up_NI.t(), torch.mm(x_ND, a1[expert].t()), out=d_b1[expert])
                torch.mm(back_NR.t(), x_ND, out=d_a1[expert])
            if d_hidden_TD is not None:
                d_x_ND = matmul(d_gate_up_NI, gate_up_EID[expert].to(dtype))
                if back_NR is not None:
                    d_x_ND.addmm_(back_NR, a1[expert])
                d_hidden_TD.index_add_(0, tokens[start : start + count], d_x_ND[:count].to(accumulator))
        if d_hidden_TD is not None:
            d_hidden_TD = d_hidden_TD.to(hidden_TD.dtype)
        d_w = None if d_w is None else d_w.view_as(w_TK)
        return d_hidden_TD, None, d_w, None, None, None, None, d_a1, d_b1, d_a2, d_b2, None


def _stack(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | QuantizedStack:
    return weight if scale is None else QuantizedStack(weight, scale, dtype)


def _plain_with_factors(  # type: ignore[no-untyped-def]
    index_TK, gate_up_EID, down_EDI, dtype, hidden_TD, w_TK, a1, b1, a2, b2
) -> torch.Tensor:
    adapters = [None if a is None else LowRank(a, b) for a, b in ((a1, b1), (a2, b2))]
    return plain_experts(hidden_TD, index_TK, w_TK, gate_up_EID, down_EDI, dtype, F.silu, *adapters)


def _padded_pairs(pairs_S: torch.Tensor, w_TK: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mixing weights of the pairs, and of `ROWS` more."""
    tokens = F.pad(pairs_S // w_TK.shape[1], [0, ROWS])
    return tokens, F.pad(w_TK.flatten().to(dtype)[pairs_S], [0, ROWS])


def _grouped_mm_experts(
    module: nn.Module,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    w_TK: torch.Tensor,
    gate_up: LowRank | None,
    down: LowRank | None,
) -> torch.Tensor:
    """One grouped product a projection, for GPUs; gradients by autograd, none for the frozen weights."""
    experts_S, pairs_S = index_TK.flatten().sort(stable=True)
    tokens_S = pairs_S // index_TK.shape[1]
    offsets_E = torch.bincount(experts_S, minlength=module.num_experts)[: module.num_experts].cumsum(0).int()

    # Index E marks an expert of another rank. Its rows lie behind the last group, where grouped products write
    # nothing, neither results nor gradients: zeros take the place of both.
    elsewhere_S1 = (experts_S >= module.num_experts).unsqueeze(-1)

    def project(x: torch.Tensor, weight: torch.Tensor, adapter: LowRank | None) -> torch.Tensor:
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets_E)
        if adapter is not None:
            # Rows and columns of whole 16 bytes, as grouped products want them: zeros do not change the sum
            padding = -adapter.down_ERI.shape[1] % (16 // x.element_size())
            a, b = F.pad(adapter.down_ERI, [0, 0, 0, padding]), F.pad(adapter.up_EOR, [0, padding])
            low = F.grouped_mm(x, a.transpose(1, 2), offs=offsets_E).masked_fill(elsewhere_S1, 0)
            y = y + F.grouped_mm(low, b.transpose(1, 2), offs=offsets_E)
        return y.masked_fill(elsewhere_S1, 0)

    x_SD = hidden_TD[tokens_S].masked_fill(elsewhere_S1, 0)
    gate, up = project(x_SD, module.gate_up_proj, gate_up).chunk(2, dim=-1)
    act_SI = (module.act_fn(gate) * up).masked_fill(elsewhere_S1, 0)
    weighted_SD = project(act_SI, module.down_proj, down).float() * w_TK.flatten()[pairs_S, None]
    out_TD = torch.zeros_like(hidden_TD, dtype=weighted_SD.dtype)
    return out_TD.index_add(0, tokens_S, weighted_SD).to(hidden_TD.dtype)


def frozen_refusal(module: nn.Module) -> str | None:
    """The reason why experts under adapters are left to PEFT, or None where they are served here."""
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)
        is_ours = weight.dtype in QUANTIZED and getattr(module, f"{name}_scale", None) is not None
        if not isinstance(weight, nn.Parameter) or not (is_ours or weight.dtype.itemsize > 1):
            return f"{name} is quantised"
        if weight.requires_grad:
            return f"{name} is trained itself, not its adapter alone"
    return None


def loop_refusal(module: nn.Module) -> str | None:
    """The reason why gradients by hand cannot serve a module of experts under adapters, or None where they can."""
    if (reason := frozen_refusal(module)) is not None:
        return reason
    if module.down_proj.device.type != "cpu":
        return f"for CPUs, down_proj is on {module.down_proj.device}"
    return None if is_silu(module.act_fn) else "its derivative is of SiLU"


def grouped_refusal(module: nn.Module) -> str | None:
    """The reason why grouped products cannot serve a module of experts under adapters, or None where they can."""
    if module.gate_up_proj.dtype in QUANTIZED:
        return "takes floats, gate_up_proj is quantised"
    return frozen_refusal(module) or grouped_mm_refusal(module)


def loop_call_refusal(hidden_states: torch.Tensor, module: nn.Module, *rest: object) -> str | None:
    """The reason why `loop_experts` does not take a call, or None where it does."""
    if not hidden_states.is_cpu:
        return f"for CPUs, hidden states are on {hidden_states.device}"
    return None if is_silu(module.act_fn) else "its derivative is of SiLU"


def grouped_call_refusal(hidden_states: torch.Tensor, module: nn.Module, *rest: object) -> str | None:
    """The reason why `grouped_mm_experts` does not take a call, or None where it does."""
    if module.gate_up_proj.dtype in QUANTIZED:
        return "takes floats, gate_up_proj is quantised"
    if (reason := grouped_mm_refusal(module)) is not None:
        return reason
    dtype = _dtype_of_products(hidden_states)
    weights = module.gate_up_proj.dtype
    return None if dtype == weights else f"takes products of the weights' dtype ({weights}), not {dtype}"


def _dtype_of_products(hidden_states: torch.Tensor) -> torch.dtype:
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def low_rank_experts(
    hidden_states: torch.Tensor,
    module: nn.Module,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: LowRank | None,
    down: LowRank | None,
    kernel: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, their weights being frozen and adapted.

    Args:
        hidden_states: `(T, D)`.
        module: has `gate_up_proj` `(E, 2I, D)` and `down_proj` `(E, D, I)` that need no gradient; quantised ones with
            `gate_up_proj_scale` and `down_proj_scale`.
        top_k_index, top_k_weights: `(T, K)`, index E for an expert of another rank, which is left out.
        gate_up, down: the adapters of both, `(E, R, in)` and `(E, out, R)`; ranks may differ.
        kernel: what computes it, given the adapters in the dtype of the products, and that dtype.

    Returns:
        `(T, D)`, of the dtype of `hidden_states`; sums over experts in fp32 (fp64 for fp64).
    """
    dtype = _dtype_of_products(hidden_states)
    gate_up, down = (
        None if a is None else LowRank(a.down_ERI.to(dtype).contiguous(), a.up_EOR.to(dtype).contiguous())
        for a in (gate_up, down)
    )
    return kernel(module, hidden_states, top_k_index, top_k_weights, gate_up, down, dtype)


def _loop(module, hidden_TD, index_TK, w_TK, gate_up, down, dtype):  # type: ignore[no-untyped-def]
    names = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
    weights = [getattr(module, name, None) for name in names]
    factors = (*(gate_up or (None, None)), *(down or (None, None)))
    with torch.autocast("cpu", enabled=False):
        return _CpuExperts.apply(hidden_TD, index_TK, w_TK, *weights, *factors, dtype)


def _grouped_mm(module, hidden_TD, index_TK, w_TK, gate_up, down, dtype):  # type: ignore[no-untyped-def]
    with torch.autocast(hidden_TD.device.type, enabled=False):
        out_TD = _grouped_mm_experts(module, hidden_TD.to(dtype), index_TK, w_TK, gate_up, down)
    return out_TD.to(hidden_TD.dtype)


def _plain(module, hidden_TD, index_TK, w_TK, gate_up, down, dtype):  # type: ignore[no-untyped-def]
    return plain_low_rank_experts(module, hidden_TD, index_TK, w_TK, gate_up, down)


loop_experts = partial(low_rank_experts, kernel=_loop)
grouped_mm_experts = partial(low_rank_experts, kernel=_grouped_mm)
eager_experts = partial(low_rank_experts, kernel=_plain)
