"""Mixtures of experts, and the dense network that is one without routing, by the compiled CPU backend.

Gate and up, SwiGLU, down and the weighted sum are one pass: the weights of an expert that has tokens are read once,
those of the others never, and no weights are copied.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..experts_grouped import is_silu
from ..operators import define
from ..selection import bypass_refusal, cpu_refusal, is_plain, plain_refusal
from . import library
from .linear import limit_of_rows
from .operators import (
    TYPES,
    addresses,
    fake_like,
    out_of_memory,
    refuse_dtype,
    refuse_shape,
    require_storage,
)


NAME = "cpu"


def experts_refusal(experts: nn.Module) -> str | None:
    """The reason why a module of routed experts cannot be served at all, or None."""
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not weight.is_contiguous():
            return f"needs the experts' weights stacked and contiguous, {name} is not"
    if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
        return "takes experts without biases, stored (E, out, in)"
    return None if is_silu(getattr(experts, "act_fn", None)) else "computes SwiGLU only"


def mlp_refusal(mlp: nn.Module) -> str | None:
    """The reason why a dense network (`gate_proj`, `up_proj`, `down_proj`) cannot be served at all, or None."""
    if not is_plain(type(mlp), "mlp"):
        return f"takes the package's own networks, not a {type(mlp).__name__}"
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(mlp, name)
        if (reason := plain_refusal(name, layer, "linear")) is not None:
            return reason
        if layer.bias is not None:
            return f"takes linear layers without bias, {name} has one"
        if not layer.weight.is_contiguous():
            return f"takes contiguous weights, {name}'s is not"
    return None if is_silu(mlp.act_fn) else "computes SwiGLU only"


def moe_refusal(moe: nn.Module) -> str | None:
    """The reason why a mixture of experts with shared ones cannot be served at all, or None."""
    if (reason := experts_refusal(moe.experts) or mlp_refusal(moe.shared_experts)) is not None:
        return reason
    floating = (p for p in moe.parameters() if p.is_floating_point())
    with torch.no_grad():
        return cpu_refusal("experts", next(floating))


def mixture_refusal(
    x: torch.Tensor, experts: nn.Module | None, top_k_weights: torch.Tensor | None, mlp: nn.Module | None
) -> str | None:
    """The reason why `mixture` does not take a call, or None where it does."""
    tensors: list[torch.Tensor] = []
    if experts is not None:
        if (reason := experts_refusal(experts)) is not None:
            return reason
        if top_k_weights is not None and top_k_weights.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
        tensors += [experts.gate_up_proj, experts.down_proj]
    if mlp is not None:
        if (reason := mlp_refusal(mlp)) is not None:
            return reason
        if experts is not None:
            reason = plain_refusal("experts", experts, "experts") or bypass_refusal("shared_experts", mlp)
            if reason is not None:
                return reason
        tensors += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    if len({tensor.dtype for tensor in tensors}) > 1:
        return "takes weights of one dtype"
    return cpu_refusal("experts" if experts is not None else "linear", x, *tensors)


def rows_refusal(x: torch.Tensor, experts: nn.Module, index: torch.Tensor, *rest: object) -> str | None:
    """The reason why a call has too many tokens for the experts, or None."""
    limit = limit_of_rows(x, experts.gate_up_proj)
    if limit is not None and index.numel() > limit.routed * experts.gate_up_proj.shape[0]:
        return f"pays up to {limit.routed} tokens an expert of {experts.gate_up_proj.dtype} on this processor"
    return None


def _mixture(
    x: torch.Tensor,
    gate_up: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    expert: torch.Tensor | None,
    weight: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    shared_gate_scale: torch.Tensor | None,
    shared_up: torch.Tensor | None,
    shared_up_scale: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    shared_down_scale: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions, not 2")
    T, D = x.shape
    E = inner = K = S = 0
    if gate_up is not None:
        if down is None or expert is None or weight is None:
            raise ValueError("gate_up is given without down, expert or weight")
        E, inner, K = gate_up.shape[0], gate_up.shape[1] // 2, expert.shape[1]
        for tensor in (expert, weight):
            if not tensor.is_contiguous() or tensor.nbytes > tensor.untyped_storage().nbytes():
                require_storage(expert=expert, weight=weight)
        expert, weight = expert.contiguous(), weight.float().contiguous()
        if expert.dtype != torch.int64 or expert.shape != (T, K):
            raise ValueError("expert is not int64 of (T, K)")
        if weight.shape != (T, K):
            refuse_shape("weight", weight, (T, K))
    if shared_gate is not None:
        if shared_up is None or shared_down is None:
            raise ValueError("shared_gate is given without shared_up or shared_down")
        S = shared_gate.shape[0]
    places = addresses(
        x,
        ("gate_up", gate_up, gate_up_scale, (E, 2 * inner, D)),
        ("down", down, down_scale, (E, D, inner)),
        ("shared_gate", shared_gate, shared_gate_scale, (S, D)),
        ("shared_up", shared_up, shared_up_scale, (S, D)),
        ("shared_down", shared_down, shared_down_scale, (D, S)),
    )
    first = shared_gate if gate_up is None else gate_up
    if first is None:
        raise ValueError("the weights are of several dtypes, or there are none")
    for each in (down, shared_gate, shared_up, shared_down):
        if each is not None and each.dtype is not first.dtype:
            raise ValueError("the weights are of several dtypes, or there are none")
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel() and library.loaded.dsv3_mixture(
        x.data_ptr(),
        TYPES[x.dtype],
        T,
        D,
        TYPES[first.dtype],
        *places[:4],
        E,
        inner,
        None if expert is None else expert.data_ptr(),
        None if weight is None else weight.data_ptr(),
        K,
        *places[4:],
        S,
        out.data_ptr(),
        int8_activations,
        torch.get_num_threads(),
    ):
        out_of_memory()
    return out


operator = define(
    "mixture(Tensor x, Tensor? gate_up, Tensor? gate_up_scale, Tensor? down, Tensor? down_scale, Tensor? expert, "
    "Tensor? weight, Tensor? shared_gate, Tensor? shared_gate_scale, Tensor? shared_up, Tensor? shared_up_scale, "
    "Tensor? shared_down, Tensor? shared_down_scale, bool int8_activations) -> Tensor",
    _mixture,
    fake_like,
    "CPU",
)


def mixture(
    x: torch.Tensor,
    experts: nn.Module | None,
    top_k_index: torch.Tensor | None,
    top_k_weights: torch.Tensor | None,
    shared: nn.Module | None,
    kernel: Callable[..., torch.Tensor] = operator,
) -> torch.Tensor:
    """The weighted sum of each token's experts, plus what a dense network gives for every token.

    Args:
        x: `(T, D)`.
        experts: `gate_up_proj` `(E, 2I, D)`, `down_proj` `(E, D, I)`, with `..._scale` where they are quantised; None
            for the dense network alone.
        top_k_index, top_k_weights: `(T, K)`; an index that is none of the E experts is left out.
        shared: has `gate_proj`, `up_proj`, `down_proj`; None for the experts alone.
        kernel: the operator, or what it calls.

    Returns:
        `(T, D)`, summed in fp32 and rounded once.
    """
    routed: tuple = (None, None, None, None)
    dense: tuple = (None, None, None, None, None, None)
    owner: object = experts
    if experts is not None:
        routed = (
            *(experts.gate_up_proj, getattr(experts, "gate_up_proj_scale", None)),
            *(experts.down_proj, getattr(experts, "down_proj_scale", None)),
        )
    if shared is not None:
        gate, up, down = shared.gate_proj, shared.up_proj, shared.down_proj
        dense = (
            *(gate.weight, getattr(gate, "weight_scale", None)),
            *(up.weight, getattr(up, "weight_scale", None)),
            *(down.weight, getattr(down, "weight_scale", None)),
        )
        owner = down if experts is None else experts
    int8_activations = x.dtype in getattr(owner, "rounded_dtypes", ())
    return kernel(x, *routed, top_k_index, top_k_weights, *dense, int8_activations)


undispatched = partial(mixture, kernel=_mixture)


def routed(x, experts, top_k_index, top_k_weights, kernel=operator):  # type: ignore[no-untyped-def]
    """`mixture` of the routed experts alone."""
    return mixture(x, experts, top_k_index, top_k_weights, None, kernel)


undispatched_routed = partial(routed, kernel=_mixture)


def mlp(x, network, kernel=operator):  # type: ignore[no-untyped-def]
    """`mixture` of a dense network alone, `x` `(..., D)`."""
    return mixture(x.reshape(-1, x.shape[-1]), None, None, None, network, kernel).view(x.shape)


undispatched_mlp = partial(mlp, kernel=_mixture)
