"""The implementations that can serve each operation of a model, and the reason where one cannot.

An operation is served by one backend at a time, chosen by Transformers' own switches (`attn_implementation`,
`experts_implementation`), by `TRANSFORMERS_DSV3_BACKENDS`, or by the model itself for each call. A backend is listed
here by name, with a function that tells why it cannot serve a given module; `explain` prints the answers for a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_torch_flex_attn_available

from . import (
    experts_auto,
    experts_cpu,
    experts_grouped,
    experts_liger,
    experts_lora,
    experts_triton,
    linear_onednn,
    mla_flash,
    mla_training,
    mla_triton,
    public_kernels,
    triton_support,
    whole_step,
)
from .selection import VARIABLE, chosen, cpu_refusal


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    Args:
        operation: what it computes, the name of one of `OPERATIONS`.
        name: its name in Transformers' switches where it has one.
        does: what sets it apart, in a few words.
        why_not: takes the module that holds the operation's weights; the reason it cannot serve that module, or None.
        choice: what to set to have it; None where it cannot be chosen by itself.
    """

    operation: str
    name: str
    does: str
    why_not: Callable[[nn.Module], str | None]
    choice: str | None = None


def _always(module: nn.Module) -> str | None:
    return None


def _weight(module: nn.Module) -> torch.Tensor:
    return next(module.parameters())


def _flex(module: nn.Module) -> str | None:
    return None if is_torch_flex_attn_available() else "this torch has no flex attention"


def _absorbed(module: nn.Module) -> str | None:
    return module.why_not_absorbed()


def _floating(module: nn.Module) -> torch.Tensor:
    return next((p for p in module.parameters() if p.is_floating_point()), _weight(module))


def _compiled(operation: str, module: nn.Module) -> str | None:
    """Why the compiled CPU backend serves no call of a module, be it without gradients; None if it serves some."""
    with torch.no_grad():
        return cpu_refusal(operation, _floating(module))


def _compiled_absorbed(module: nn.Module) -> str | None:
    return _absorbed(module) or _compiled("attention", module)


def _compiled_experts(module: nn.Module) -> str | None:
    return experts_cpu.experts_refusal(module) or _compiled("experts", module)


def _triton_absorbed(module: nn.Module) -> str | None:
    return _absorbed(module) or mla_triton.why_not(module)


def _triton_norms(module: nn.Module) -> str | None:
    return triton_support.triton_refusal("linear", _floating(module))


def _public_absorbed(name: str, module: nn.Module) -> str | None:
    return _absorbed(module) or mla_flash.why_not(name, module)


def _of_transformers(why_not: Callable[[nn.Module], str | None], module: nn.Module) -> str | None:
    """Why one of Transformers' experts functions cannot serve a module, whose reason of its own is `why_not`."""
    return why_not(module) if _takes_a_function(module) else f"{type(module).__name__} computes its experts itself"


def _takes_a_function(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate")  # which Transformers' decorator gives to those that ask it for one


def _training_attention(module: nn.Module) -> str | None:
    return mla_training.why_not(_weight(module))


def _onednn_linear(module: nn.Module) -> str | None:
    return linear_onednn.why_not(_weight(module))


EXPANDED, ABSORBED, EXPERTS = "attention, expanded", "attention, absorbed", "experts"
ADAPTED, LINEAR, STEP = "experts under LoRA", "linear layers", "decoding step"


def _expanded(name: str, does: str, why_not: Callable[[nn.Module], str | None]) -> Backend:
    return Backend(EXPANDED, name, does, why_not, f'attn_implementation="{name}"')


def _experts(name: str, does: str, why_not: Callable[[nn.Module], str | None]) -> Backend:
    return Backend(EXPERTS, name, does, why_not, f'experts_implementation="{name}"')


def _public(name: str, does: str) -> Backend:
    return Backend(ABSORBED, name, does, partial(_public_absorbed, name), f"{VARIABLE}=attention={name}")


# Order is that of the printed page
BACKENDS = [
    _expanded("eager", "plain matrix products, gives attention weights", _always),
    _expanded("sdpa", "PyTorch's fused attention", _always),
    _expanded("flex_attention", "compiled by PyTorch for the mask at hand", _flex),
    _expanded("flash_attention_2", "FlashAttention 2", partial(public_kernels.flash_attention_refusal, 2)),
    _expanded("flash_attention_3", "FlashAttention 3", partial(public_kernels.flash_attention_refusal, 3)),
    Backend(EXPANDED, "cpu", "compiled, where sdpa is asked for", partial(_compiled, "attention")),
    Backend(EXPANDED, "cpu_training", "gradients in place, where sdpa is asked for", _training_attention),
    Backend(ABSORBED, "cpu", "compiled: reads each latent once for all heads", _compiled_absorbed),
    Backend(
        ABSORBED,
        "triton",
        "GPU programs: each latent read once for many heads; norm, rotation and cache in one launch",
        _triton_absorbed,
    ),
    _public("flash_mla", "FlashMLA; copies the whole context at every step, three times the memory traffic"),
    _public("flash_attention_3_mla", "FlashAttention 3 on the latents as they lie in the cache"),
    Backend(ABSORBED, "torch", "matrix products on the cached latents", _absorbed),
    _experts(experts_auto.NAME, "the fastest that takes a call: triton, cpu, grouped_cpu, grouped_mm, eager", _always),
    _experts(
        triton_support.NAME,
        "Triton programs for GPUs: sorted on the device, reads the chosen experts' weights once",
        experts_triton.why_not,
    ),
    _experts(experts_cpu.NAME, "compiled: one pass, reads the chosen experts' weights once", _compiled_experts),
    _experts("eager", "one expert after another", _always),
    _experts(
        "grouped_mm",
        "one grouped product over tokens sorted by expert",
        partial(_of_transformers, experts_auto.grouped_mm_refusal),
    ),
    _experts(
        experts_grouped.NAME,
        "for training on a CPU: gradients in place, of chosen experts only",
        partial(_of_transformers, experts_grouped.why_not),
    ),
    _experts(
        "batched_mm",
        "copies the weights of each token's experts, for few tokens on a GPU",
        partial(_of_transformers, _always),
    ),
    _experts(
        experts_liger.NAME,
        "Liger-Kernel, for training on a GPU; waits for the GPU once a call",
        partial(_of_transformers, experts_liger.why_not),
    ),
    _experts(
        "deepgemm",
        "DeepGEMM from the Hub, for inference",
        partial(_of_transformers, public_kernels.deepgemm_refusal),
    ),
    _experts("sonicmoe", "SonicMoE from the Hub", partial(_of_transformers, public_kernels.sonicmoe_refusal)),
    Backend(ADAPTED, "cpu", "gradients in place, of the adapters of chosen experts only", experts_lora.loop_refusal),
    Backend(ADAPTED, "grouped_mm", "grouped products with thin ones beside them", experts_lora.grouped_refusal),
    Backend(ADAPTED, "eager", "one expert after another", experts_lora.frozen_refusal),
    Backend(ADAPTED, "peft", "PEFT's own: adapters times adapters, of the size of all experts' weights", _always),
    Backend(LINEAR, "cpu", "compiled: reads the weights once for a few rows", partial(_compiled, "linear")),
    Backend(LINEAR, "triton", "norms in one launch; products are PyTorch's own", _triton_norms),
    Backend(LINEAR, "onednn", "fp32 products with gradients by oneDNN instead of MKL", _onednn_linear),
    Backend(LINEAR, "torch", "PyTorch's own", _always),
    Backend(
        STEP,
        "graph",
        "compiled whole, one launch of a CUDA graph a token",
        whole_step.why_not,
        'generate(…, cache_implementation="static")',
    ),
    Backend(STEP, "layers", "layer after layer, over a cache that grows", _always),
]


class _Parts(NamedTuple):
    """The modules that a model's operations are asked for, the first of each kind."""

    model: PreTrainedModel
    attention: nn.Module
    experts: nn.Module | None
    is_adapted: bool


WITHOUT_GRADIENTS, TRAINING, OTHERWISE = "in use without gradients", "in use for training", "in use otherwise"


def _serving(operation: str, module: nn.Module, notes: dict[str, str], rest: str) -> dict[str, str]:
    """Those of some backends, each with a note, that can serve a module; what they leave is for `rest`."""
    why_not = {backend.name: backend.why_not for backend in BACKENDS if backend.operation == operation}
    found = {name: note for name, note in notes.items() if why_not[name](module) is None}
    return {**found, rest: OTHERWISE if found else "in use"}


def _expanded_in_use(parts: _Parts) -> dict[str, str]:
    asked_for = parts.model.config._attn_implementation
    notes = {"cpu": WITHOUT_GRADIENTS, "cpu_training": TRAINING} if asked_for == "sdpa" else {}
    return _serving(EXPANDED, parts.attention, notes, asked_for)


def _absorbed_in_use(parts: _Parts) -> dict[str, str]:
    if _absorbed(parts.attention) is not None:
        return {}
    notes = {}
    if parts.model.config._attn_implementation != "eager":
        if chosen["attention"] in mla_flash.PACKAGES:
            notes[chosen["attention"]] = "in use without gradients and masks"
        notes["cpu"] = notes["triton"] = WITHOUT_GRADIENTS
    return _serving(ABSORBED, parts.attention, notes, "torch")


def _experts_in_use(parts: _Parts) -> dict[str, str]:
    assert parts.experts is not None
    asked_for = parts.model.config._experts_implementation or "eager"
    if asked_for == experts_auto.NAME:
        if not _weight(parts.experts).is_cpu:
            return _serving(EXPERTS, parts.experts, {triton_support.NAME: "in use"}, asked_for)
        notes = {experts_cpu.NAME: WITHOUT_GRADIENTS, experts_grouped.NAME: TRAINING}
        return {**_serving(EXPERTS, parts.experts, notes, asked_for), asked_for: "in use"}
    # These leave to `auto` what they do not take
    if asked_for in (experts_cpu.NAME, experts_liger.NAME, triton_support.NAME):
        return _serving(EXPERTS, parts.experts, {asked_for: "in use where it takes a call"}, experts_auto.NAME)
    return {asked_for if _takes_a_function(parts.experts) else "eager": "in use"}


def _adapted_in_use(parts: _Parts) -> dict[str, str]:
    assert parts.experts is not None
    listed = [backend for backend in BACKENDS if backend.operation == ADAPTED]
    return {next(backend.name for backend in listed if backend.why_not(parts.experts) is None): "in use"}


def _linear_in_use(parts: _Parts) -> dict[str, str]:
    notes = {
        "cpu": f"{WITHOUT_GRADIENTS}, for a few rows",
        "triton": f"{WITHOUT_GRADIENTS}, for norms",
        "onednn": TRAINING,
    }
    return _serving(LINEAR, parts.model, notes, "torch")


def _step_in_use(parts: _Parts) -> dict[str, str]:
    settings = getattr(parts.model, "generation_config", None)
    if getattr(settings, "cache_implementation", None) == "static" and whole_step.why_not(parts.model) is None:
        return {"graph": "in use"}
    return {"layers": "in use"}


@dataclass(frozen=True)
class Operation:
    """What a model computes that more than one backend can serve.

    Args:
        name: as in the page's headings.
        serves: what it is needed for; None leaves it out.
        module: the part of a model that backends are asked about; None where the model has none.
        in_use: the backends in use and a note for each.
    """

    name: str
    serves: Callable[[_Parts], str | None]
    module: Callable[[_Parts], nn.Module | None]
    in_use: Callable[[_Parts], dict[str, str]]


OPERATIONS = [
    Operation(EXPANDED, lambda p: "prefill and training", lambda p: p.attention, _expanded_in_use),
    Operation(
        ABSORBED,
        lambda p: "decoding with a cache, where fewer multiplications than expanding",
        lambda p: p.attention,
        _absorbed_in_use,
    ),
    Operation(
        EXPERTS,
        lambda p: "this model has none" if p.experts is None else "routed experts",
        lambda p: p.experts,
        _experts_in_use,
    ),
    Operation(
        ADAPTED,
        lambda p: "adapters of the experts' weights" if p.is_adapted else None,
        lambda p: p.experts,
        _adapted_in_use,
    ),
    Operation(
        LINEAR, lambda p: "projections, dense networks, norms and the router", lambda p: p.model, _linear_in_use
    ),
    Operation(STEP, lambda p: "all of the above, for one token in generate()", lambda p: p.model, _step_in_use),
]


def _parts(model: nn.Module) -> _Parts:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"explain takes a loaded model, not {model!r}: for a folder, `transformers-dsv3 explain FOLDER`."
        )
    attention = next((module for module in model.modules() if hasattr(module, "why_not_absorbed")), None)
    if attention is None:
        raise ValueError(
            f"{type(model).__name__} has no attention of this package: load it with `transformers_dsv3` imported."
        )
    experts = next((m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "num_experts")), None)
    wrappers = (m for m in model.modules() if type(m).__name__ == "ParamWrapper")  # PEFT's, around what they adapt
    return _Parts(
        next(module for module in model.modules() if isinstance(module, PreTrainedModel)),
        attention,
        experts,
        experts is not None and any(type(m.get_base_layer()) is type(experts) for m in wrappers),
    )


def _line(backend: Backend, module: nn.Module, in_use: dict[str, str]) -> str:
    if backend.name in in_use:
        mark, note = "*", in_use[backend.name]
    elif (reason := backend.why_not(module)) is not None:
        mark, note = " ", f"no: {reason}"
    else:
        mark = " "
        note = "not in use with what was chosen" if backend.choice is None else f"can be chosen: {backend.choice}"
    return f"  {mark} {backend.name:<21} {backend.does}; {note}"


def _place(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def explain(model: PreTrainedModel) -> str:
    """Tells which backend serves each operation of a model, and why the others do not.

    Nothing is fetched from the Hub for it: of kernels that would be, it says what they need.

    Args:
        model: any DeepSeek-V3 model of this package, or a model that holds one (PEFT's wrappers do).

    Returns:
        Lines of text, a block for each operation: the backend in use is marked `*`, the others carry the reason they
        cannot serve, or how to choose them.

    Raises:
        ValueError: for a model without multi-head latent attention of this package.
    """
    parts = _parts(model)
    parameter = next(model.parameters())
    lines = [f"{type(model).__name__} on {_place(parameter.device)}, {str(parameter.dtype).removeprefix('torch.')}"]
    for operation in OPERATIONS:
        serves = operation.serves(parts)
        if serves is None:
            continue
        lines.append(f"{operation.name} ({serves})")
        module = operation.module(parts)
        if module is None:
            continue
        in_use = operation.in_use(parts)
        listed = [backend for backend in BACKENDS if backend.operation == operation.name]
        lines.extend(_line(backend, module, in_use) for backend in listed)
        elsewhere = in_use.keys() - {backend.name for backend in listed}
        lines.extend(f"  * {name:<21} registered outside this package; in use" for name in elsewhere)
    return "\n".join(lines)
