"""The page that tells which backend serves each operation of a model, and why not the others.

It prints the table that calls are dispatched by (`backends`). Which of its backends are in use is what the model's
settings leave of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from . import experts_auto, experts_grouped, experts_liger, mla_flash, pages, triton_support
from .backends import (
    ABSORBED,
    ADAPTED,
    EXPANDED,
    EXPERTS,
    LINEAR,
    MIXTURE,
    MLP,
    NORM,
    PAGED,
    PAGES,
    PROJECTIONS,
    ROUTER,
    STEP,
    takes_a_function,
)
from .cpu import mixture
from .dispatch import Backend, Operation
from .selection import chosen


class _Parts(NamedTuple):
    """The modules that a model's operations are asked for, the first of each kind."""

    model: PreTrainedModel
    attention: nn.Module
    moe: nn.Module | None
    experts: nn.Module | None
    is_adapted: bool


WITHOUT_GRADIENTS, TRAINING, OTHERWISE = "in use without gradients", "in use for training", "in use otherwise"


def refusal_of(backend: Backend, module: nn.Module) -> str | None:
    """The reason why a backend serves no call of a module, or None where it serves some."""
    return backend.failure or backend.module_refusal(module)


def _serving(operation: Operation, module: nn.Module, notes: dict[str, str], rest: str) -> dict[str, str]:
    """Those of some backends, each with a note, that can serve a module; what they leave is for `rest`."""
    found = {name: note for name, note in notes.items() if refusal_of(operation[name], module) is None}
    return {**found, rest: OTHERWISE if found else "in use"}


def _expanded_in_use(parts: _Parts) -> dict[str, str]:
    asked_for = parts.model.config._attn_implementation
    notes = {"cpu": WITHOUT_GRADIENTS, "cpu_training": TRAINING} if asked_for == "sdpa" else {}
    return _serving(EXPANDED, parts.attention, notes, asked_for)


def _absorbed_in_use(parts: _Parts) -> dict[str, str]:
    if refusal_of(ABSORBED["torch"], parts.attention) is not None:
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
        if not next(parts.experts.parameters()).is_cpu:
            return _serving(EXPERTS, parts.experts, {triton_support.NAME: "in use"}, asked_for)
        notes = {mixture.NAME: WITHOUT_GRADIENTS, experts_grouped.NAME: TRAINING}
        return {**_serving(EXPERTS, parts.experts, notes, asked_for), asked_for: "in use"}
    # These leave to `auto` what they do not take
    if asked_for in (mixture.NAME, experts_liger.NAME, triton_support.NAME):
        return _serving(EXPERTS, parts.experts, {asked_for: "in use where it takes a call"}, experts_auto.NAME)
    return {asked_for if takes_a_function(parts.experts) else "eager": "in use"}


def _mixture_in_use(parts: _Parts) -> dict[str, str]:
    assert parts.moe is not None
    named = parts.model.config._experts_implementation in (experts_auto.NAME, mixture.NAME)
    return _serving(MIXTURE, parts.moe, {"cpu": WITHOUT_GRADIENTS} if named else {}, "parts")


def _adapted_in_use(parts: _Parts) -> dict[str, str]:
    assert parts.experts is not None
    return {next(b.name for b in ADAPTED.backends if refusal_of(b, parts.experts) is None): "in use"}


def _in_use(operation: Operation, rest: str, module: Callable[[_Parts], nn.Module], **notes: str) -> Callable:
    def in_use(parts: _Parts) -> dict[str, str]:
        stated = {
            backend.name: notes.get(backend.name, TRAINING if backend.trains else WITHOUT_GRADIENTS)
            for backend in operation.backends
            if backend.function is not None
        }
        return _serving(operation, module(parts), stated, rest)

    return in_use


def _step_in_use(parts: _Parts) -> dict[str, str]:
    settings = getattr(parts.model, "generation_config", None)
    is_static = getattr(settings, "cache_implementation", None) == "static"
    if is_static and refusal_of(STEP["graph"], parts.model) is None:
        return {"graph": "in use"}
    if not is_static and refusal_of(STEP["program"], parts.model) is None:
        return {"program": f"{WITHOUT_GRADIENTS}, of one model over a cache that grows", "layers": OTHERWISE}
    return {"layers": "in use"}


def _pages_in_use(parts: _Parts) -> dict[str, str]:
    huge, total = pages.bytes_in_huge_pages(parts.model)
    share = f"in use for {huge / 2**30:.2f} of {total / 2**30:.2f} GiB of the weights"
    return _serving(PAGES, parts.model, {"huge": share} if huge else {}, "normal")


class _Section(NamedTuple):
    """A block of the page.

    Args:
        serves: what the operation is needed for; None leaves it out.
        module: the part of a model that backends are asked about; None where the model has none.
        in_use: the backends in use and a note for each.
    """

    operation: Operation
    serves: Callable[[_Parts], str | None]
    module: Callable[[_Parts], nn.Module | None]
    in_use: Callable[[_Parts], dict[str, str]]


def _model(parts: _Parts) -> nn.Module:
    return parts.model


def _attention(parts: _Parts) -> nn.Module:
    return parts.attention


PAGE = (
    _Section(EXPANDED, lambda p: "prefill and training", _attention, _expanded_in_use),
    _Section(
        ABSORBED,
        lambda p: "decoding with a cache, where fewer multiplications than expanding",
        _attention,
        _absorbed_in_use,
    ),
    _Section(
        PAGED,
        lambda p: "many sequences at once, their latents in a pool",
        _attention,
        _in_use(PAGED, "torch", _attention),
    ),
    _Section(
        PROJECTIONS,
        lambda p: "queries and latents of each token",
        _attention,
        _in_use(PROJECTIONS, "layers", _attention),
    ),
    _Section(
        EXPERTS,
        lambda p: "this model has none" if p.experts is None else "routed experts",
        lambda p: p.experts,
        _experts_in_use,
    ),
    _Section(
        MIXTURE,
        lambda p: None if p.moe is None else "both in one pass",
        lambda p: p.moe,
        _mixture_in_use,
    ),
    _Section(
        ADAPTED,
        lambda p: "adapters of the experts' weights" if p.is_adapted else None,
        lambda p: p.experts,
        _adapted_in_use,
    ),
    _Section(
        ROUTER,
        lambda p: None if p.moe is None else "the choice of experts",
        _model,
        _in_use(ROUTER, "torch", _model),
    ),
    _Section(
        MLP,
        lambda p: "of dense layers and shared experts",
        _model,
        _in_use(MLP, "layers", _model),
    ),
    _Section(
        LINEAR,
        lambda p: "projections and the head",
        _model,
        _in_use(LINEAR, "torch", _model, cpu=f"{WITHOUT_GRADIENTS}, for a few rows"),
    ),
    _Section(
        NORM,
        lambda p: "of layers, queries and latents",
        _model,
        _in_use(NORM, "torch", _model),
    ),
    _Section(STEP, lambda p: "all of the above, for one token in generate()", _model, _step_in_use),
    _Section(
        PAGES,
        lambda p: "memory of weights that are read and of caches" if next(p.model.parameters()).is_cpu else None,
        _model,
        _pages_in_use,
    ),
)


def _parts(model: nn.Module) -> _Parts:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"explain takes a loaded model, not {model!r}: for a folder, `transformers-dsv3 explain FOLDER`."
        )
    attention = next((module for module in model.modules() if hasattr(module, "absorbed_refusal")), None)
    if attention is None:
        raise ValueError(
            f"{type(model).__name__} has no attention of this package: load it with `transformers_dsv3` imported, or "
            "make it of `transformers_dsv3.DeepseekV3Config` (native's config makes native's class)."
        )
    experts = next((m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "num_experts")), None)
    wrappers = (m for m in model.modules() if type(m).__name__ == "ParamWrapper")  # PEFT's, around what they adapt
    return _Parts(
        next(module for module in model.modules() if isinstance(module, PreTrainedModel)),
        attention,
        next((m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "shared_experts")), None),
        experts,
        experts is not None and any(type(m.get_base_layer()) is type(experts) for m in wrappers),
    )


def _line(backend: Backend, module: nn.Module, in_use: dict[str, str]) -> str:
    if backend.name in in_use:
        mark, note = "*", in_use[backend.name]
    elif (reason := refusal_of(backend, module)) is not None:
        mark, note = " ", f"no: {reason}"
    else:
        mark = " "
        note = "not in use with what was chosen" if backend.choice is None else f"can be chosen: {backend.choice}"
    return f"  {mark} {backend.name:<21} {backend.does}; {note}"


def _place(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _quantized_weights(model: nn.Module, dtype: torch.dtype) -> str | None:
    """A line on weights of few bits, or None where there are none."""
    kinds: dict[int, list[str]] = {}
    rounded = set()
    for module in model.modules():
        bits = getattr(module, "bits", None)
        if getattr(module, "weight_scale", None) is None and getattr(module, "down_proj_scale", None) is None:
            continue
        kinds.setdefault(bits, []).append(type(module).__name__)  # type: ignore[arg-type]
        rounded |= {dtype in dtypes for dtypes in (getattr(module, "rounded_dtypes", None),) if dtypes is not None}
    if not kinds:
        return None
    counted = (
        f"{bits} bits in {', '.join(f'{names.count(name)} {name}' for name in dict.fromkeys(names))}"
        for bits, names in sorted(kinds.items())
    )
    activations = "rounded to 8 bits by the compiled CPU backend" if True in rounded else "whole"
    return f"weights in groups of 32: {'; '.join(counted)}; activations of {_name(dtype)} are {activations}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def explain(model: PreTrainedModel) -> str:
    """Tells which backend serves each operation of a model, and why the others do not.

    Nothing is fetched from the Hub for it: of kernels that would be, it says what they need.

    Args:
        model: any DeepSeek-V3 model of this package, or a model that holds one (PEFT's wrappers do).

    Returns:
        Lines of text: the widths of quantised weights, then a block for each operation: the backend in use is marked
        `*`, the others carry the reason they cannot serve, or how to choose them.

    Raises:
        ValueError: for a model without multi-head latent attention of this package.
    """
    parts = _parts(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters()))
    lines = [f"{type(model).__name__} on {_place(parameter.device)}, {_name(parameter.dtype)}"]
    if (quantized := _quantized_weights(model, parameter.dtype)) is not None:
        lines.append(quantized)
    for section in PAGE:
        serves = section.serves(parts)
        if serves is None:
            continue
        lines.append(f"{section.operation.name} ({serves})")
        module = section.module(parts)
        if module is None:
            continue
        in_use = section.in_use(parts)
        backends = section.operation.backends
        lines.extend(_line(backend, module, in_use) for backend in backends)
        elsewhere = in_use.keys() - {backend.name for backend in backends}
        lines.extend(f"  * {name:<21} registered outside this package; in use" for name in elsewhere)
    return "\n".join(lines)
