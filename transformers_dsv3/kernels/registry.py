"""The implementations that can serve each operation of a model, and the reason where one cannot.

An operation is served by one backend at a time, chosen by Transformers' own switches (`attn_implementation`,
`experts_implementation`) or by the model itself for each call. A backend is listed here by name, with a function that
tells why it cannot serve a given module; `explain` prints the answers for a model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_torch_flex_attn_available,
)

from . import experts_auto, experts_cpu, experts_grouped, linear_onednn, mla_training
from .experts_auto import grouped_mm_refusal
from .selection import cpu_refusal


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    Args:
        operation: what it computes: "attention, expanded", "attention, absorbed", "experts" or "linear layers".
        name: its name in Transformers' switches where it has one.
        does: what sets it apart, in a few words.
        why_not: takes the module that holds the operation's weights; the reason it cannot serve that module, or None.
    """

    operation: str
    name: str
    does: str
    why_not: Callable[[nn.Module], str | None]


def _always(module: nn.Module) -> str | None:
    return None


def _weight(module: nn.Module) -> torch.Tensor:
    return next(module.parameters())


def _gpu_package(available: bool, package: str) -> Callable[[nn.Module], str | None]:
    def why_not(module: nn.Module) -> str | None:
        if not available:
            return f"{package} is not installed"
        return None if _weight(module).device.type == "cuda" else "needs a GPU"

    return why_not


def _flex(module: nn.Module) -> str | None:
    return None if is_torch_flex_attn_available() else "this torch has no flex attention"


def _hub_kernel(module: nn.Module) -> str | None:
    if _weight(module).device.type != "cuda":
        return "needs a GPU"
    return None if is_kernels_available() else "the kernels package is not installed"


def _absorbed(module: nn.Module) -> str | None:
    return module.why_not_absorbed()


def _compiled(operation: str, module: nn.Module) -> str | None:
    """Why the compiled CPU backend serves no call of a module, be it without gradients; None if it serves some."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    with torch.no_grad():
        return cpu_refusal(operation, _weight(module) if weight is None else weight)


def _compiled_attention(module: nn.Module) -> str | None:
    return _compiled("attention", module)


def _compiled_absorbed(module: nn.Module) -> str | None:
    return _absorbed(module) or _compiled_attention(module)


def _compiled_experts(module: nn.Module) -> str | None:
    return experts_cpu.experts_refusal(module) or _compiled("experts", module)


def _compiled_linear(module: nn.Module) -> str | None:
    return _compiled("linear", module)


def _training_attention(module: nn.Module) -> str | None:
    return mla_training.why_not(_weight(module))


def _onednn_linear(module: nn.Module) -> str | None:
    return linear_onednn.why_not(_weight(module))


# Order is that of the printed page
BACKENDS = [
    Backend("attention, expanded", "eager", "plain matrix products, gives attention weights", _always),
    Backend("attention, expanded", "sdpa", "PyTorch's fused attention", _always),
    Backend("attention, expanded", "flex_attention", "compiled by PyTorch for the mask at hand", _flex),
    Backend(
        "attention, expanded",
        "flash_attention_2",
        "FlashAttention 2",
        _gpu_package(is_flash_attn_2_available(), "flash-attn 2"),
    ),
    Backend(
        "attention, expanded",
        "flash_attention_3",
        "FlashAttention 3",
        _gpu_package(is_flash_attn_3_available(), "flash-attn 3"),
    ),
    Backend("attention, expanded", "cpu", "compiled, where sdpa is asked for", _compiled_attention),
    Backend("attention, expanded", "cpu_training", "gradients in place, where sdpa is asked for", _training_attention),
    Backend("attention, absorbed", "cpu", "compiled: reads each latent once for all heads", _compiled_absorbed),
    Backend("attention, absorbed", "torch", "matrix products on the cached latents", _absorbed),
    Backend(
        "experts", experts_auto.NAME, "the fastest that takes a call: cpu, grouped_cpu, grouped_mm, eager", _always
    ),
    Backend(
        "experts", experts_cpu.NAME, "compiled: one pass, reads the chosen experts' weights once", _compiled_experts
    ),
    Backend("experts", "eager", "one expert after another", _always),
    Backend("experts", "grouped_mm", "one grouped product over tokens sorted by expert", grouped_mm_refusal),
    Backend(
        "experts",
        experts_grouped.NAME,
        "for training on a CPU: gradients in place, of chosen experts only",
        experts_grouped.why_not,
    ),
    Backend("experts", "batched_mm", "copies the weights of each token's experts, for few tokens on a GPU", _always),
    Backend("experts", "deepgemm", "DeepGEMM from the Hub", _hub_kernel),
    Backend("experts", "sonicmoe", "SonicMoE from the Hub", _hub_kernel),
    Backend("linear layers", "cpu", "compiled: reads the weights once for a few rows", _compiled_linear),
    Backend("linear layers", "onednn", "fp32 products with gradients by oneDNN instead of MKL", _onednn_linear),
    Backend("linear layers", "torch", "PyTorch's own", _always),
]


def explain(model: PreTrainedModel) -> str:
    """Tells which backend serves each operation of a model, and why the others do not.

    Args:
        model: any DeepSeek-V3 model of this package, or a model that holds one (PEFT's wrappers do).

    Returns:
        Lines of text, a block for each operation: the backend in use is marked `*`, the others carry the reason they
        cannot serve, or how to choose them.

    Raises:
        ValueError: for a model without multi-head latent attention of this package.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"explain takes a loaded model, not {model!r}: for a folder, `transformers-dsv3 explain FOLDER`."
        )
    attention = [module for module in model.modules() if hasattr(module, "why_not_absorbed")]
    if not attention:
        raise ValueError(
            f"{type(model).__name__} has no attention of this package: load it with `transformers_dsv3` imported."
        )
    experts = [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "num_experts")]
    parameter = next(model.parameters())
    config = model.config
    compiled, training, else_torch = "in use without gradients", "in use for training", "in use otherwise"
    in_use: dict[str, dict[str, str]] = {
        "attention, expanded": {config._attn_implementation: "in use"},
        "attention, absorbed": {"torch": "in use"} if _absorbed(attention[0]) is None else {},
        "experts": {config._experts_implementation or "eager": "in use"},
        "linear layers": {"torch": "in use"},
    }
    if config._attn_implementation == "sdpa":
        expanded = {}
        if _compiled_attention(attention[0]) is None:
            expanded["cpu"] = compiled
        if _training_attention(attention[0]) is None:
            expanded["cpu_training"] = training
        if expanded:
            in_use["attention, expanded"] = {**expanded, "sdpa": else_torch}
    if config._attn_implementation != "eager" and _compiled_absorbed(attention[0]) is None:
        in_use["attention, absorbed"] = {"cpu": compiled, "torch": else_torch}
    if config._experts_implementation == experts_auto.NAME and experts:
        if _compiled_experts(experts[0]) is None:
            in_use["experts"][experts_cpu.NAME] = compiled
        if experts_grouped.why_not(experts[0]) is None:
            in_use["experts"][experts_grouped.NAME] = training
    linear = {}
    if _compiled_linear(model) is None:
        linear["cpu"] = compiled + ", for a few rows"
    if _onednn_linear(model) is None:
        linear["onednn"] = training
    if linear:
        in_use["linear layers"] = {**linear, "torch": else_torch}
    switches = {"attention, expanded": "attn_implementation", "experts": "experts_implementation"}
    serves = {
        "attention, expanded": "prefill and training",
        "attention, absorbed": "decoding with a cache, where fewer multiplications than expanding",
        "experts": "routed experts" if experts else "this model has none",
        "linear layers": "projections, dense networks, norms and the router",
    }
    lines = [f"{type(model).__name__} on {parameter.device}, {str(parameter.dtype).removeprefix('torch.')}"]
    for operation, notes in in_use.items():
        lines.append(f"{operation} ({serves[operation]})")
        listed = [backend for backend in BACKENDS if backend.operation == operation]
        modules = {"experts": experts, "linear layers": [model]}.get(operation, attention)
        if not modules:
            continue
        for backend in listed:
            reason = backend.why_not(modules[0])
            mark = "*" if backend.name in notes else " "
            if mark == "*":
                note = notes[backend.name]
            elif reason is not None:
                note = f"no: {reason}"
            elif operation in switches and not (
                operation == "attention, expanded" and backend.name in ("cpu", "cpu_training")
            ):
                note = f'can be chosen: {switches[operation]}="{backend.name}"'
            else:
                note = "not in use with what was chosen"
            lines.append(f"  {mark} {backend.name:<18} {backend.does}; {note}")
        for used in notes.keys() - {backend.name for backend in listed}:
            lines.append(f"  * {used:<18} registered outside this package; in use")
    return "\n".join(lines)
