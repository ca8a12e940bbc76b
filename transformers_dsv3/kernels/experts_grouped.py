"""Experts for training on a CPU: tokens sorted by expert, one product an active expert, gradients by hand.

Against autograd through the plain loop or Transformers' `grouped_mm`:

- the gradient of the weights is written in place, and memory of experts that no token chose is never touched;
- kept for the backward pass are the gate and up products only, no copies of tokens and no outputs of experts;
- the mixing weight multiplies the activations between the two projections, which are narrower than the experts'
  outputs. So its gradient is a product of activations, and outputs need not be kept for it. In bf16 it costs no
  rounding, since activations are computed in fp32 and rounded once;
- outputs are summed over experts in fp32 (fp64 for fp64).

Shape suffixes: T tokens, K experts chosen a token, E experts, S = T * K pairs of token and expert, sorted by expert,
D hidden size, I width of an expert, N pairs of one expert, rounded up (see `expert_segments`). `w` is a mixing weight.
"""

import mmap
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .experts_plain import accumulator_dtype, differentiable_gradients, is_batched, plain_experts
from .matmul_cpu import matmul
from .operators import define
from .selection import SILU, bypass_refusal, is_plain
from .weight_gradients import store_for


NAME = "grouped_cpu"

# oneDNN compiles code for every shape, which takes longer than the product, and keeps a thousand or so. Loads differ
# from step to step, so that hardly one would be found again; of their multiples of 16 there are few.
ROWS = 16


def module_refusal(module: nn.Module) -> str | None:
    """The reason why `grouped_experts` cannot serve a module of experts, or None where it can."""
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"needs the experts' weights stacked, {name} is not"
        if type(weight) not in (nn.Parameter, torch.Tensor):
            return f"{name} is a {type(weight).__name__}, not a plain tensor"
        if weight.is_meta:
            return f"{name} is offloaded, it is not in memory"
        if weight.device.type != "cpu":
            return f"for CPUs, {name} is on {weight.device}"
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"takes fp64, fp32, bf16 and fp16 weights, {name} is {weight.dtype}"
    if module.gate_up_proj.dtype != module.down_proj.dtype:
        return f"gate_up_proj is {module.gate_up_proj.dtype}, down_proj {module.down_proj.dtype}"
    if module.gate_up_proj.shape[1] != 2 * module.down_proj.shape[2]:
        return "gate_up_proj is not (E, 2I, D) with down_proj (E, D, I)"
    if getattr(module, "has_bias", False):
        return "has no biases"
    if not getattr(module, "is_concatenated", True):
        return "takes gates above ups, not in turns"
    activation = getattr(module, "act_fn", None)
    if not is_silu(activation):
        return f"its derivative is of SiLU, the activation is {type(activation).__name__}"
    return None


def is_silu(activation: object) -> bool:
    """Whether an activation function is SiLU, and nothing is to run before or after it."""
    if activation is SILU:
        return True
    return is_plain(type(activation), "activation") and bypass_refusal("act_fn", activation) is None  # type: ignore[arg-type]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that occupy memory only from where they are first written; `torch.zeros` writes them.

    No huge pages are asked for: virtual machines that give free memory back to their host take twenty times as long
    for one as for the same memory in small pages.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < 2**20 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _gradient(weight: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of a weight, zero for experts without tokens. The others' is written as a whole."""
    if counts_E.all():
        # Memory that torch has at hand, which is faster than fresh memory from the system
        return torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    return lazy_zeros(weight.shape, weight.dtype)


def expert_segments(counts_E: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """For each active expert, its index, its first pair, its number of pairs, and that number rounded up."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, start, count, -(-count // ROWS) * ROWS
        start += count


def forward_pass(
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    w_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        gate_up_EID, down_EDI: tensors, or what else gives the matrix of an expert by its number.
        dtype: that of the products; inputs and weights are cast to it, an expert at a time.
        keep: whether a backward pass follows.

    Returns:
        The output `(T, D)`; then what the backward pass needs: gate and up products, tokens of the pairs among the T*K
        of `index_TK`, sorted by expert, and how many each expert has.
    """
    E, _, D = gate_up_EID.shape
    I = down_EDI.shape[2]
    accumulator = accumulator_dtype(dtype)
    experts, pairs_S = index_TK.flatten().sort(stable=True)
    # Rows behind an expert's own make its products whole multiples of ROWS; their results are not used. Index E marks
    # an expert of another rank: sorted last, not counted, so never computed.
    counts_E = torch.bincount(experts, minlength=E)[:E]
    tokens = F.pad(pairs_S // max(index_TK.shape[1], 1), [0, ROWS])
    w_S = F.pad(w_TK.flatten().to(accumulator)[pairs_S], [0, ROWS])
    kept_SI = hidden_TD.new_empty((len(tokens) if keep else 0, 2 * I), dtype=dtype)
    out_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=accumulator)
    for expert, start, count, rows in expert_segments(counts_E):
        x_ND = hidden_TD.index_select(0, tokens[start : start + rows]).to(dtype)
        # Rows past the expert's own are overwritten by the next
        kept = kept_SI[start : start + rows] if keep else None
        gate_up_NI = matmul(x_ND, gate_up_EID[expert].to(dtype).t(), out=kept).to(accumulator)
        act_NI = F.silu(gate_up_NI[:, :I]).mul_(gate_up_NI[:, I:]).mul_(w_S[start : start + rows, None])
        y_ND = matmul(act_NI.to(dtype), down_EDI[expert].to(dtype).t())
        out_TD.index_add_(0, tokens[start : start + count], y_ND[:count].to(accumulator))
    return out_TD.to(hidden_TD.dtype), kept_SI, pairs_S, counts_E


def _fake_forward(hidden_TD, index_TK, w_TK, gate_up_EID, down_EDI, dtype, keep):  # type: ignore[no-untyped-def]
    pairs = index_TK.numel()
    kept_shape = (pairs + ROWS if keep else 0, gate_up_EID.shape[1])
    return (
        torch.empty_like(hidden_TD, memory_format=torch.contiguous_format),
        hidden_TD.new_empty(kept_shape, dtype=dtype),
        index_TK.new_empty(pairs, dtype=torch.long),
        index_TK.new_empty(gate_up_EID.shape[0], dtype=torch.long),
    )


# Of each active expert, for the gradients of its weights: its number, first pair, pairs, pairs rounded up; activations
# with mixing weights `(N, I)`; gradient of gate and up products `(N, 2I)`
Apart = list[tuple[int, int, int, int, torch.Tensor, torch.Tensor]]


def _backward(
    grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    w_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    kept_SI: torch.Tensor,
    pairs_S: torch.Tensor,
    counts_E: torch.Tensor,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_w: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, mixing weights, `gate_up_proj` and `down_proj`; empty where not needed."""
    saved = (hidden_TD, w_TK, gate_up_EID, down_EDI, kept_SI, pairs_S, counts_E)
    return backward_pass(grad_TD, *saved, dtype, needs_hidden, needs_w, needs_gate_up, needs_down)


def backward_pass(
    grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    w_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    kept_SI: torch.Tensor,
    pairs_S: torch.Tensor,
    counts_E: torch.Tensor,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_w: bool,
    needs_gate_up: bool,
    needs_down: bool,
    apart: Apart | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_backward`.

    Args:
        apart: where it is given, it gets what `weight_gradients` needs; no gradients of weights are to be asked for.
    """
    I = down_EDI.shape[2]
    accumulator = accumulator_dtype(dtype)
    tokens = F.pad(pairs_S // max(w_TK.shape[1], 1), [0, ROWS])
    w_S = F.pad(w_TK.flatten().to(accumulator)[pairs_S], [0, ROWS])
    d_hidden_TD = hidden_TD.new_zeros(hidden_TD.shape if needs_hidden else 0, dtype=accumulator)
    d_w = w_TK.new_zeros(w_TK.numel() if needs_w else 0)
    d_gate_up_EID = _gradient(gate_up_EID, counts_E) if needs_gate_up else gate_up_EID.new_empty(0)
    d_down_EDI = _gradient(down_EDI, counts_E) if needs_down else down_EDI.new_empty(0)
    for expert, start, count, rows in expert_segments(counts_E):
        g_ND = grad_TD.index_select(0, tokens[start : start + rows]).to(dtype)
        gate_up_NI = kept_SI[start : start + rows].to(accumulator, copy=rows > count)
        if rows > count:
            # Sums over pairs are over the expert's own
            g_ND[count:] = 0
            gate_up_NI[count:] = 0
        gate_NI, up_NI = gate_up_NI[:, :I], gate_up_NI[:, I:]
        w_N1 = w_S[start : start + rows, None]
        silu_NI = F.silu(gate_NI)
        act_NI = silu_NI * up_NI
        if needs_down:
            matmul(g_ND.t(), (act_NI * w_N1).to(dtype), out=d_down_EDI[expert])
        weighted_NI = (act_NI * w_N1).to(dtype) if apart is not None else None
        if not (needs_hidden or needs_w or needs_gate_up or apart is not None):
            continue
        d_act_NI = matmul(g_ND, down_EDI[expert].to(dtype)).to(accumulator)
        if needs_w:
            d_w[pairs_S[start : start + count]] = act_NI.mul_(d_act_NI).sum(dim=1)[:count].to(d_w.dtype)
        if not (needs_hidden or needs_gate_up or apart is not None):
            continue
        d_act_NI.mul_(w_N1)
        d_gate_up_NI = torch.empty_like(gate_up_NI, dtype=dtype)
        d_gate_up_NI[:, I:] = silu_NI.mul_(d_act_NI)
        d_gate_up_NI[:, :I] = torch.ops.aten.silu_backward(d_act_NI.mul_(up_NI), gate_NI)
        if apart is not None:
            assert weighted_NI is not None
            apart.append((expert, start, count, rows, weighted_NI, d_gate_up_NI))
        if needs_gate_up:
            x_ND = hidden_TD.index_select(0, tokens[start : start + rows]).to(dtype)
            x_ND[count:] = 0
            matmul(d_gate_up_NI.t(), x_ND, out=d_gate_up_EID[expert])
        if needs_hidden:
            d_x_ND = matmul(d_gate_up_NI, gate_up_EID[expert].to(dtype))
            d_hidden_TD.index_add_(0, tokens[start : start + count], d_x_ND[:count].to(accumulator))
    return d_hidden_TD.to(hidden_TD.dtype), d_w.view(w_TK.shape if needs_w else 0), d_gate_up_EID, d_down_EDI


def weight_gradients(
    apart: Apart,
    grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    pairs_S: torch.Tensor,
    counts_E: torch.Tensor,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gate_up_proj` and `down_proj`, from what a backward pass has set apart."""
    tokens = F.pad(pairs_S // max(top_k, 1), [0, ROWS])
    d_gate_up_EID, d_down_EDI = (_gradient(weight, counts_E) for weight in (gate_up_EID, down_EDI))
    for expert, start, count, rows, weighted_NI, d_gate_up_NI in apart:
        for rows_TD, factor_N, out in (
            (grad_TD, weighted_NI, d_down_EDI[expert]),
            (hidden_TD, d_gate_up_NI, d_gate_up_EID[expert]),
        ):
            taken_ND = rows_TD.index_select(0, tokens[start : start + rows]).to(factor_N.dtype)
            taken_ND[count:] = 0
            left, right = (taken_ND, factor_N) if rows_TD is grad_TD else (factor_N, taken_ND)
            matmul(left.t(), right, out=out)
    return d_gate_up_EID, d_down_EDI


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_TD, hidden_TD, w_TK, gate_up_EID, down_EDI, kept_SI, pairs_S, counts_E, dtype, *needs
):
    inputs = (hidden_TD, w_TK, gate_up_EID, down_EDI)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs))


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden_TD, index_TK, w_TK, gate_up_EID, down_EDI, ctx.dtype, _ = inputs
    ctx.save_for_backward(index_TK, hidden_TD, w_TK, gate_up_EID, down_EDI, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The parameters themselves: what is kept may be other tensors of the same numbers
    ctx.store, ctx.parameters = store_for(gate_up_EID, down_EDI), (gate_up_EID, down_EDI)


def _gradients_apart(ctx, grad_TD, saved, needs_hidden, needs_w):  # type: ignore[no-untyped-def]
    hidden_TD, w_TK, gate_up_EID, down_EDI, kept_SI, pairs_S, counts_E = saved
    apart: Apart = []
    d_hidden, d_w, _, _ = backward_pass(
        grad_TD,
        hidden_TD,
        w_TK,
        gate_up_EID,
        down_EDI,
        kept_SI,
        pairs_S,
        counts_E,
        ctx.dtype,
        needs_hidden,
        needs_w,
        needs_gate_up=False,
        needs_down=False,
        apart=apart,
    )
    parameters, top_k = ctx.parameters, w_TK.shape[1]
    experts = (gate_up_EID, down_EDI, pairs_S, counts_E)

    def compute() -> list[tuple[nn.Parameter, torch.Tensor]]:
        return list(zip(parameters, weight_gradients(apart, grad_TD, hidden_TD, *experts, top_k)))

    ctx.store.put_off(compute)
    return d_hidden if needs_hidden else None, None, d_w if needs_w else None, None, None, None, None


def _gradients(ctx, grad_TD, *_):  # type: ignore[no-untyped-def]
    if grad_TD is None:
        return (None,) * 7
    hidden, _, w, gate_up, down, _, _ = ctx.needs_input_grad
    needs = (hidden, w, gate_up, down)
    index_TK, *saved = ctx.saved_tensors
    # The gradients are to be differentiated themselves, or there are several at once (`is_grads_batched`)
    if torch.is_grad_enabled() or is_batched(grad_TD):
        d_hidden, d_w, d_gate_up, d_down = differentiable_gradients(
            lambda hidden_TD, w_TK, up, down: plain_experts(hidden_TD, index_TK, w_TK, up, down, ctx.dtype),
            tuple(saved[:4]),
            needs,
            grad_TD,
        )
        return d_hidden, None, d_w, d_gate_up, d_down, None, None
    if ctx.store is not None:
        return _gradients_apart(ctx, grad_TD, saved, hidden, w)
    grads = backward_operator(grad_TD, *saved, ctx.dtype, *needs)
    d_hidden, d_w, d_gate_up, d_down = (grad if needed else None for grad, needed in zip(grads, needs))
    return d_hidden, None, d_w, d_gate_up, d_down, None, None


forward_operator = define("grouped_experts", forward_pass, _fake_forward, gradients=(_gradients, _keep_for_backward))
backward_operator = define("grouped_experts_backward", _backward, _fake_backward)


def grouped_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, with the signature of Transformers' experts functions.

    Under autocast, products are in its dtype, sums over experts and the result as without.

    Args:
        module: has `gate_up_proj` `(E, 2I, D)`, `down_proj` `(E, D, I)` and SiLU between them; see `module_refusal`.
        hidden_states: `(T, D)`, of the weights' dtype unless under autocast.
        top_k_index: `(T, K)`, E for an expert of another rank, which is left out.
        top_k_weights: `(T, K)`, of any floating dtype.

    Returns:
        `(T, D)`, of the dtype of `hidden_states`.

    Raises:
        ValueError: where `module_refusal` gives a reason, or for hidden states of another dtype than the weights.
    """
    if (reason := module_refusal(module)) is not None:
        raise ValueError(f'experts_implementation="{NAME}" cannot serve this module: {reason}.')
    gate_up, down = module.gate_up_proj, module.down_proj
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif dtype != gate_up.dtype:
        raise ValueError(f'experts_implementation="{NAME}": hidden states are {dtype}, weights {gate_up.dtype}.')
    inputs = (hidden_states, top_k_weights, gate_up, down)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.autocast("cpu", enabled=False):
        return forward_operator(hidden_states, top_k_index, top_k_weights, gate_up, down, dtype, keep)[0]
