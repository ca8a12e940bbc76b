"""`experts_implementation="triton"`: routed experts by Triton's programs, for NVIDIA and AMD GPUs.

Pairs of a token and an expert are sorted by expert once, on the device; tiles have pairs of one expert each; nothing
makes the host wait, so that CUDA graphs can hold a call. The same inputs give the same bits. The programs are in
`triton_src/experts_*.py`; `auto` takes them for all calls on a GPU that they can serve.

Shape suffixes: T tokens, K experts chosen a token, E experts, S = T * K pairs, X = E + 1, D hidden size, I width of an
expert.
"""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .cpu.mixture import experts_refusal as stack_refusal
from .experts_plain import differentiable_gradients, is_batched, plain_experts
from .operators import define
from .selection import PLAIN
from .triton_support import device_refusal, on_device, triton_refusal
from .weight_gradients import store_for


WEIGHTS = ("gate_up_proj", "down_proj")


def module_refusal(module: nn.Module) -> str | None:
    """The reason why `triton_experts` cannot serve a module of experts, or None where it can."""
    if (reason := stack_refusal(module)) is not None:
        return reason
    if not getattr(module, "is_concatenated", True):
        return "takes gates above ups, not in turns"
    gate_up, down = (getattr(module, name) for name in WEIGHTS)
    for name in WEIGHTS:
        weight = getattr(module, name)
        if type(weight) not in PLAIN and is_traceable_wrapper_subclass(weight):
            return f"takes plain tensors, {name} is a {type(weight).__name__}"
        if weight.dtype is torch.int8:
            if getattr(module, f"{name}_scale", None) is None:
                return f"takes INT8 weights with scales, {name} has none"
        elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes fp32, bf16, fp16 and INT8 weights, {name} is {weight.dtype}"
        if weight.is_meta:
            return f"{name} is offloaded, it is not in memory"
    if gate_up.dtype != down.dtype or gate_up.device != down.device:
        return "takes weights of one dtype on one device"
    E, D, I = down.shape
    if gate_up.shape != (E, 2 * I, D):
        return "takes gate_up_proj (E, 2I, D) with down_proj (E, D, I)"
    return device_refusal(gate_up)


def experts_refusal(module: nn.Module, hidden_states: torch.Tensor, top_k_weights: torch.Tensor) -> str | None:
    """The reason why `triton_experts` does not take a call, or None where it does."""
    if (reason := module_refusal(module) or triton_refusal("experts", hidden_states)) is not None:
        return reason
    weight = module.gate_up_proj
    if weight.device != hidden_states.device:
        return f"needs weights on {hidden_states.device}, not on {weight.device}"
    dtype = _dtype_of_products(hidden_states)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"follows autocast to bf16 and fp16, not to {dtype}"
    if weight.dtype not in (dtype, torch.int8) and not _autocast(hidden_states):
        return f"takes activations of the weights' dtype ({weight.dtype}), not {dtype}"
    needs = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    if needs and weight.dtype is torch.int8:
        return "has no gradients with INT8 weights"
    return None


def _autocast(tensor: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _dtype_of_products(hidden_states: torch.Tensor) -> torch.dtype:
    if _autocast(hidden_states):
        return torch.get_autocast_dtype(hidden_states.device.type)
    return hidden_states.dtype


def _forward(
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    mixing_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_EDI: torch.Tensor,
    down_scale: torch.Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        dtype: that of the products; inputs and weights of another are cast to it.
        keep: whether a backward pass follows.

    Returns:
        The output `(T, D)`; then what the backward pass needs, empty without `keep`: gate and up products, the order
        of the pairs, and where each expert's begin in it.
    """
    from .triton_src import experts_forward, experts_sort

    E = gate_up_EID.shape[0]
    if not index_TK.numel():
        return _empty(hidden_TD, index_TK, gate_up_EID, dtype, keep, fill=0)
    index_TK, mixing_TK = index_TK.contiguous(), mixing_TK.contiguous()
    with on_device(hidden_TD):
        order_S, offsets_X = experts_sort.sort_pairs(index_TK, E)
        sorting = (order_S, offsets_X)
        x_TD = hidden_TD.to(dtype).contiguous()
        act_SI, kept_SI = experts_forward.activations(x_TD, *sorting, mixing_TK, gate_up_EID, gate_up_scale, keep)
        out_SD = experts_forward.products(act_SI, *sorting, down_EDI, down_scale, False, len(hidden_TD))
        out_TD = experts_forward.sums(out_SD, index_TK, E, hidden_TD.dtype)
    if kept_SI is None:
        return (out_TD, *_empty(hidden_TD, index_TK, gate_up_EID, dtype, keep)[1:])
    return out_TD, kept_SI, *sorting


def _fake_forward(hidden_TD, index_TK, mixing_TK, gate_up_EID, gate_up_scale, down_EDI, down_scale, dtype, keep):  # type: ignore[no-untyped-def]
    return _empty(hidden_TD, index_TK, gate_up_EID, dtype, keep)


def _empty(
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    dtype: torch.dtype,
    keep: bool,
    fill: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_forward` returns, not written or filled."""
    pairs = index_TK.numel() if keep else 0
    results = (
        hidden_TD.new_empty(hidden_TD.shape),
        hidden_TD.new_empty((pairs, gate_up_EID.shape[1]), dtype=dtype),
        index_TK.new_empty(pairs, dtype=torch.int32),
        index_TK.new_empty(gate_up_EID.shape[0] + 1 if keep else 0, dtype=torch.int32),
    )
    if fill is not None:
        for result in results:
            result.fill_(fill)
    return results


def _backward(
    grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    mixing_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    kept_SI: torch.Tensor,
    order_S: torch.Tensor,
    offsets_X: torch.Tensor,
    needs_hidden: bool,
    needs_mixing: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, mixing weights, `gate_up_proj` and `down_proj`; empty where not needed."""
    from .triton_src import experts_backward, experts_forward

    inputs = (hidden_TD, mixing_TK, gate_up_EID, down_EDI)
    needs = (needs_hidden, needs_mixing, needs_gate_up, needs_down)
    if not index_TK.numel():
        return tuple(x.new_zeros(x.shape if needed else (0,)) for x, needed in zip(inputs, needs))
    results: list[torch.Tensor | None] = [None] * 4
    index_TK, mixing_TK = index_TK.contiguous(), mixing_TK.contiguous()
    T, K = index_TK.shape
    sorting, dtype = (order_S, offsets_X), kept_SI.dtype
    with on_device(hidden_TD):
        grad_TD = grad_TD.to(dtype).contiguous()
        d_kept_SI, activation_SI, results[1] = experts_backward.through_activations(
            grad_TD, *sorting, mixing_TK, down_EDI, kept_SI, needs_hidden or needs_gate_up, needs_down, needs_mixing
        )
        if activation_SI is not None:
            results[3] = experts_backward.weight_gradients(grad_TD, activation_SI, *sorting, K, True, down_EDI.dtype)
            del activation_SI
        if needs_gate_up:
            x_TD = hidden_TD.to(dtype).contiguous()
            results[2] = experts_backward.weight_gradients(d_kept_SI, x_TD, *sorting, K, False, gate_up_EID.dtype)
        if needs_hidden:
            d_hidden_SD = experts_forward.products(d_kept_SI, *sorting, gate_up_EID, None, True, T)
            results[0] = experts_forward.sums(d_hidden_SD, index_TK, len(gate_up_EID), hidden_TD.dtype)
    return tuple(x.new_empty(0) if result is None else result for x, result in zip(inputs, results))


def _fake_backward(
    grad_TD, hidden_TD, index_TK, mixing_TK, gate_up_EID, down_EDI, kept_SI, order_S, offsets_X, *needs
):  # type: ignore[no-untyped-def]
    inputs = (hidden_TD, mixing_TK, gate_up_EID, down_EDI)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs))


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden_TD, index_TK, mixing_TK, gate_up_EID, _, down_EDI, _, ctx.dtype, _ = inputs
    ctx.save_for_backward(hidden_TD, index_TK, mixing_TK, gate_up_EID, down_EDI, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The parameters themselves: what is kept may be other tensors of the same numbers
    ctx.store, ctx.parameters = store_for(gate_up_EID, down_EDI), (gate_up_EID, down_EDI)


def _gradients_apart(ctx, grad_TD, needs_mixing):  # type: ignore[no-untyped-def]
    from .triton_src import experts_backward, experts_forward

    hidden_TD, index_TK, mixing_TK, gate_up_EID, down_EDI, kept_SI, order_S, offsets_X = ctx.saved_tensors
    index_TK, mixing_TK, dtype = index_TK.contiguous(), mixing_TK.contiguous(), kept_SI.dtype
    sorting: tuple[torch.Tensor, torch.Tensor] = (order_S, offsets_X)
    parameters, (T, K) = ctx.parameters, index_TK.shape
    grad_TD = grad_TD.to(dtype).contiguous()
    with on_device(hidden_TD):
        d_kept_SI, activation_SI, d_mixing_TK = experts_backward.through_activations(
            grad_TD, *sorting, mixing_TK, down_EDI, kept_SI, True, True, needs_mixing
        )
        d_hidden_SD = experts_forward.products(d_kept_SI, *sorting, gate_up_EID, None, True, T)
        d_hidden_TD = experts_forward.sums(d_hidden_SD, index_TK, len(gate_up_EID), hidden_TD.dtype)

    def compute() -> list[tuple[nn.Parameter, torch.Tensor]]:
        gate_up, down = parameters
        with on_device(hidden_TD):
            x_TD = hidden_TD.to(dtype).contiguous()
            d_down = experts_backward.weight_gradients(grad_TD, activation_SI, *sorting, K, True, down.dtype)
            d_gate_up = experts_backward.weight_gradients(d_kept_SI, x_TD, *sorting, K, False, gate_up.dtype)
        return [(gate_up, d_gate_up), (down, d_down)]

    ctx.store.put_off(compute)
    return d_hidden_TD, None, d_mixing_TK, None, None, None, None, None, None


def _gradients(ctx, grad_TD, *_):  # type: ignore[no-untyped-def]
    if grad_TD is None:
        return (None,) * 9
    hidden, _, mixing, gate_up, _, down, _, _, _ = ctx.needs_input_grad
    needs = (hidden, mixing, gate_up, down)
    # The gradients are to be differentiated themselves, or there are several at once (`is_grads_batched`)
    if torch.is_grad_enabled() or is_batched(grad_TD):
        hidden_TD, index_TK, *inputs = ctx.saved_tensors[:5]
        d_hidden, d_mixing, d_gate_up, d_down = differentiable_gradients(
            lambda hidden_TD, w_TK, up, down: plain_experts(hidden_TD, index_TK, w_TK, up, down, ctx.dtype),
            (hidden_TD, *inputs),
            needs,
            grad_TD,
        )
        return d_hidden, None, d_mixing, d_gate_up, None, d_down, None, None, None
    if ctx.store is not None and hidden and ctx.saved_tensors[1].numel():
        return _gradients_apart(ctx, grad_TD, mixing)
    grads = backward_operator(grad_TD, *ctx.saved_tensors, *needs)
    d_hidden, d_mixing, d_gate_up, d_down = (grad if needed else None for grad, needed in zip(grads, needs))
    return d_hidden, None, d_mixing, d_gate_up, None, d_down, None, None, None


forward_operator = define("triton_experts", _forward, _fake_forward, gradients=(_gradients, _keep_for_backward))
backward_operator = define("triton_experts_backward", _backward, _fake_backward)


def triton_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs; only where `experts_refusal` gives no reason against it.

    Under autocast, products are in its dtype, sums over experts in fp32 and the result as without.

    Args:
        module: has `gate_up_proj` `(E, 2I, D)` and `down_proj` `(E, D, I)`, with fp16 `..._scale`
            `(E, 2I, D / 32)` and `(E, D, I / 32)` where they are INT8.
        hidden_states: `(T, D)`.
        top_k_index: `(T, K)`; what is none of the E experts is left out, as index E under expert parallelism.
        top_k_weights: `(T, K)`, of any floating dtype.

    Returns:
        `(T, D)`, of the dtype of `hidden_states`.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    scales = [getattr(module, f"{name}_scale", None) for name in WEIGHTS]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, top_k_weights, gate_up, down))
    dtype = _dtype_of_products(hidden_states)
    return forward_operator(
        hidden_states, top_k_index, top_k_weights, gate_up, scales[0], down, scales[1], dtype, keep
    )[0]
