"""Mixtures of experts, and the dense network that is one without routing, by the compiled CPU backend.

Gate and up, SwiGLU, down and the weighted sum are one pass: the weights of an expert that has tokens are read once,
those of the others never, and no weights are copied.
"""

import torch
from torch import nn

from . import cpu_ops  # noqa: F401  (defines the operators)
from .experts_grouped import is_silu
from .linear_cpu import FEWEST_INT8_ROWS
from .selection import bypass_refusal, cpu_refusal, is_marked, plain_refusal


NAME = "cpu"


def _weights(module: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return getattr(module, name), getattr(module, f"{name}_scale", None)


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
    if not is_marked(type(mlp), "is_plain_mlp"):
        return f"takes the package's own networks, not a {type(mlp).__name__}"
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(mlp, name)
        if (reason := plain_refusal(name, layer, nn.Linear, "is_plain_linear")) is not None:
            return reason
        if layer.bias is not None:
            return f"takes linear layers without bias, {name} has one"
        if not layer.weight.is_contiguous():
            return f"takes contiguous weights, {name}'s is not"
    return None if is_silu(mlp.act_fn) else "computes SwiGLU only"


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
            for name, module in (("experts", experts), ("shared_experts", mlp)):
                if (reason := bypass_refusal(name, module)) is not None:
                    return reason
        tensors += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    if len({tensor.dtype for tensor in tensors}) > 1:
        return "takes weights of one dtype"
    return cpu_refusal("experts" if experts is not None else "linear", x, *tensors)


def mixture(
    x: torch.Tensor,
    experts: nn.Module | None,
    top_k_index: torch.Tensor | None,
    top_k_weights: torch.Tensor | None,
    mlp: nn.Module | None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, plus what a dense network gives for every token.

    Args:
        x: `(T, D)`.
        experts: `gate_up_proj` `(E, 2I, D)`, `down_proj` `(E, D, I)`, with `..._scale` of their first two dimensions
            where they are INT8; None for the dense network alone.
        top_k_index, top_k_weights: `(T, K)`; an index that is none of the E experts is left out.
        mlp: has `gate_proj`, `up_proj`, `down_proj`; None for the experts alone.

    Returns:
        `(T, D)`, summed in fp32 and rounded once.
    """
    none: tuple[None, None] = (None, None)
    routed = [*_weights(experts, "gate_up_proj"), *_weights(experts, "down_proj")] if experts is not None else none * 2
    dense = (
        [tensor for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) for tensor in _weights(layer, "weight")]
        if mlp is not None
        else none * 3
    )
    owner = experts if experts is not None else mlp.down_proj  # type: ignore[union-attr]
    int8_activations = getattr(owner, "int8_activations", False) and x.shape[0] >= FEWEST_INT8_ROWS
    return torch.ops.transformers_dsv3.mixture(x, *routed, top_k_index, top_k_weights, *dense, int8_activations)


def route_refusal(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """The reason why `torch.ops.transformers_dsv3.route` does not take a call, or None where it does."""
    if not weight.is_contiguous():
        return "takes a contiguous router weight"
    return cpu_refusal("linear", x, weight)


def may_serve(experts_implementation: str | None) -> bool:
    """Whether the choice of experts' implementation leaves them to this backend."""
    return experts_implementation in ("auto", NAME)
