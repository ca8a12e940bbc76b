"""The table: for each operation of a model its backends, in the order in which they are tried.

Adding a backend is a file with its functions and a row here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import is_torch_flex_attn_available

from . import (
    experts_grouped,
    experts_liger,
    experts_lora,
    experts_triton,
    linear_onednn,
    mla_flash,
    mla_training,
    mla_triton,
    pages,
    public_kernels,
    rows_triton,
    selection,
    triton_support,
    whole_step,
)
from .cpu import attention as cpu_attention
from .cpu import cached as cpu_cached
from .cpu import dequantize as cpu_dequantize
from .cpu import linear as cpu_linear
from .cpu import mixture as cpu_mixture
from .cpu import project as cpu_project
from .cpu import router as cpu_router
from .cpu import rows as cpu_rows
from .cpu import step as cpu_step
from .dispatch import Backend, Operation, Refusal, always
from .selection import VARIABLE, call_refusal, cpu_refusal


# What backends say of a module, for `explain`


def _weight(module: nn.Module) -> torch.Tensor:
    return next(module.parameters())


def _floating(module: nn.Module) -> torch.Tensor:
    return next((p for p in module.parameters() if p.is_floating_point()), _weight(module))


def _flex(module: nn.Module) -> str | None:
    return None if is_torch_flex_attn_available() else "this torch has no flex attention"


def _absorbed(module: nn.Module) -> str | None:
    return module.absorbed_refusal()


def _compiled(operation: str, module: nn.Module) -> str | None:
    """Why the compiled CPU backend serves no call of a module, be it without gradients; None if it serves some."""
    like = _floating(module)
    if like.dtype in selection.QUANTIZED:
        like = torch.empty(0, device=like.device)  # activations alone have a dtype there
    with torch.no_grad():
        return cpu_refusal(operation, like)


def _program(model: nn.Module) -> str | None:
    decoder = getattr(model, "base_model", model)
    decoder = getattr(decoder, "language_model", decoder)  # beside a vision tower
    if not hasattr(decoder, "decoding"):
        return f"{type(decoder).__name__} has no program of its steps"
    return decoder.decoding.refusal(decoder)


def _compiled_experts(module: nn.Module) -> str | None:
    return cpu_mixture.experts_refusal(module) or _compiled("experts", module)


def _widened(module: nn.Module) -> str | None:
    """Why no call of a module of quantised weights, or of a model with some, has them turned to bf16."""
    weights = [p for p in module.parameters() if p.dtype in selection.QUANTIZED] or [_weight(module)]
    with torch.no_grad():
        return cpu_dequantize.refusal(torch.empty(0, dtype=torch.bfloat16, device=weights[0].device), weights[0])


def _widened_in_tiles(module: nn.Module) -> str | None:
    return _widened(module) or cpu_dequantize.tiles_refusal()


def _triton_rows(module: nn.Module) -> str | None:
    return triton_support.triton_refusal("linear", _floating(module))


def takes_a_function(module: nn.Module) -> bool:
    """Whether a module of experts asks Transformers' `ExpertsInterface` for the function that computes it."""
    return hasattr(module, "_apply_gate")


def _of_transformers(refusal: Refusal, module: nn.Module) -> str | None:
    """Why one of Transformers' experts functions cannot serve a module, whose reason of its own is `refusal`."""
    return refusal(module) if takes_a_function(module) else f"{type(module).__name__} computes its experts itself"


# What they say of a call, where it is asked otherwise than by the function's own arguments


def _of_cache(refusal: Refusal) -> Refusal:
    def of_cache(q_nope, q_rope, latent, k_rope, weight, mask, *rest):  # type: ignore[no-untyped-def]
        return refusal(q_nope, latent, k_rope, weight, mask)

    return of_cache


def _of_keys(refusal: Refusal) -> Refusal:
    def of_keys(q_nope, q_rope, kv, k_rope, mask, *rest):  # type: ignore[no-untyped-def]
        return refusal(q_nope, kv, k_rope, mask, 0.0)

    return of_keys


def _compiled_mixture(x, experts, index, weights, mlp):  # type: ignore[no-untyped-def]
    return cpu_mixture.mixture_refusal(x, experts, weights, mlp)


def _widened_mixture(x, experts, index, weights, mlp):  # type: ignore[no-untyped-def]
    return cpu_dequantize.mixture_refusal(x, experts, weights, mlp)


def _widened_mlp(x, mlp):  # type: ignore[no-untyped-def]
    return cpu_dequantize.mixture_refusal(x, None, None, mlp)


def _compiled_mlp(x, mlp):  # type: ignore[no-untyped-def]
    return cpu_mixture.mixture_refusal(x, None, None, mlp)


def _compiled_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    return cpu_mixture.mixture_refusal(x, experts, weights, None)


def _triton_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    if x.is_cpu:
        return "is interpreted where it is asked for by name only"
    return experts_triton.experts_refusal(experts, x, weights)


def _grouped_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    if (reason := experts_grouped.module_refusal(experts) or call_refusal()) is not None:
        return reason
    if x.dtype == experts.gate_up_proj.dtype or torch.is_autocast_enabled("cpu"):
        return None
    return f"takes activations of the weights' dtype ({experts.gate_up_proj.dtype}), not {x.dtype}"


def _batched_mm_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    if x.is_cpu or torch.is_grad_enabled() or index.numel() > experts.num_experts:
        return "pays for a few tokens on a GPU"  # where `generate` would switch to it
    return _grouped_mm_routed(x, experts, index, weights)


def _grouped_mm_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    return _of_transformers(public_kernels.grouped_mm_refusal, experts)


def _eager_routed(x, experts, index, weights):  # type: ignore[no-untyped-def]
    return _of_transformers(always, experts)


def plain_experts(experts: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    """What a module of experts computes by itself, behind the decorator by which Transformers chooses a function."""
    kind = type(experts)
    _, forwards = selection.PLAIN_CLASSES.get(kind, ("", ((kind, kind.forward),)))
    return forwards[0][1].__wrapped__(experts, *arguments)


def _by_transformers(name: str) -> Callable[..., torch.Tensor]:
    def by_transformers(x, experts, index, weights):  # type: ignore[no-untyped-def]
        return ALL_EXPERTS_FUNCTIONS.get_interface(name, plain_experts)(experts, x, index, weights)

    return by_transformers


def _module_first(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of Transformers' interface for experts, with the activations as its first argument."""

    def module_first(x, experts, index, weights):  # type: ignore[no-untyped-def]
        return function(experts, x, index, weights)

    return module_first


def _onednn_layer(x, weight, scale, bias, int8_activations):  # type: ignore[no-untyped-def]
    return linear_onednn.linear_refusal(x, weight)


def _onednn(x, weight, scale, bias, int8_activations):  # type: ignore[no-untyped-def]
    return linear_onednn.linear(x, weight, bias)


def _public(name: str, does: str) -> Backend:
    def unchosen(*arguments: object) -> str | None:
        return None if selection.chosen["attention"] == name else "has to be asked for"

    return Backend(
        name,
        does,
        lambda module: _absorbed(module) or mla_flash.module_refusal(name, module),
        mla_flash.absorbed_attention,
        unchosen,
        _of_cache(mla_flash.absorbed_refusal),
        choice=f"{VARIABLE}=attention={name}",
    )


def _expanded(name: str, does: str, refusal: Refusal = always) -> Backend:
    return Backend(name, does, refusal, choice=f'attn_implementation="{name}"')


def _experts(name: str, does: str, module_refusal: Refusal = always, **rest: Any) -> Backend:
    return Backend(name, does, module_refusal, choice=f'experts_implementation="{name}"', **rest)


ATTENTION_PARTS = cpu_project.PLAIN_PARTS
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
PLAIN = Backend("torch", "PyTorch's own")
WIDENED = "many rows: quantised weights turned to bf16, by pieces, for products on matrix units"

EXPANDED = Operation(
    "attention, expanded",
    (
        Backend(
            "cpu",
            "compiled, where sdpa is asked for",
            partial(_compiled, "attention"),
            cpu_attention.expanded_attention,
            # Its mask is not the same from call to call
            call_refusal=_of_keys(cpu_attention.expanded_refusal),
        ),
        Backend(
            "cpu_training",
            "gradients in place, where sdpa is asked for",
            lambda module: mla_training.tensor_refusal(_weight(module)),
            mla_training.expanded_attention,
            call_refusal=_of_keys(mla_training.expanded_refusal),
            trains=True,
        ),
        _expanded("eager", "plain matrix products, gives attention weights"),
        _expanded("sdpa", "PyTorch's fused attention"),
        _expanded("flex_attention", "compiled by PyTorch for the mask at hand", _flex),
        _expanded("flash_attention_2", "FlashAttention 2", partial(public_kernels.flash_attention_refusal, 2)),
        _expanded("flash_attention_3", "FlashAttention 3", partial(public_kernels.flash_attention_refusal, 3)),
    ),
    switch="attention",
)
ABSORBED = Operation(
    "attention, absorbed",
    (
        _public("flash_mla", "FlashMLA; copies the whole context at every step, three times the memory traffic"),
        _public("flash_attention_3_mla", "FlashAttention 3 on the latents as they lie in the cache"),
        Backend(
            "cpu",
            "compiled: reads each latent once for all heads",
            lambda module: _absorbed(module) or _compiled("attention", module),
            cpu_attention.absorbed_attention_operator,
            cpu_attention.weight_refusal,
            cpu_attention.cache_refusal,
            cpu_attention.absorbed_attention,
        ),
        Backend(
            "triton",
            "GPU programs: each latent read once for many heads; norm, rotation and cache in one launch",
            lambda module: _absorbed(module) or mla_triton.module_refusal(module),
            mla_triton.absorbed_attention,
            call_refusal=_of_cache(mla_triton.absorbed_refusal),
        ),
        Backend("torch", "matrix products on the cached latents", _absorbed),
    ),
    ("kv_b_proj",),
    switch="attention",
)
PAGED = Operation(
    "attention over pages",
    (
        Backend(
            "cpu",
            "compiled: reads each latent where its page lies, once for all heads",
            lambda module: _absorbed(module) or _compiled("attention", module),
            cpu_cached.attention,
            cpu_attention.weight_refusal,
            cpu_cached.pages_refusal,
        ),
        Backend("torch", "each sequence by itself, over a copy of its pages"),
    ),
    ("kv_b_proj",),
    switch="attention",
)
PROJECTIONS = Operation(
    "projections of attention",
    (
        Backend(
            "cpu",
            "compiled: queries, latents, norms and rotation in one call",
            partial(_compiled, "attention"),
            cpu_project.project,
            cpu_project.project_refusal,
            undispatched=cpu_project.undispatched,
        ),
        Backend("layers", "layer after layer"),
    ),
    ATTENTION_PARTS,
    switch="attention",
)
LATENT_ROWS = Operation(
    "latents into the cache",
    (
        Backend(
            "triton",
            "norm, rotation and the write to the cache in one launch",
            _triton_rows,
            rows_triton.latent_rows,
            call_refusal=rows_triton.latent_rows_refusal,
        ),
        PLAIN,
    ),
    switch="attention",
)
ROTATION = Operation(
    "rotary embedding",
    (
        Backend(
            "cpu",
            "compiled: one call",
            partial(_compiled, "attention"),
            cpu_rows.rotate_operator,
            cpu_rows.rotate_refusal,
            undispatched=cpu_rows.rotate,
        ),
        PLAIN,
    ),
    switch="attention",
)
NORM = Operation(
    "norms",
    (
        Backend(
            "cpu",
            "compiled: one call",
            partial(_compiled, "linear"),
            cpu_rows.rms_norm_operator,
            cpu_rows.rms_norm_refusal,
            undispatched=cpu_rows.rms_norm,
        ),
        Backend(
            "triton",
            "one launch; compiled graphs leave norms to the compiler",
            _triton_rows,
            rows_triton.rms_norm_operator,
            call_refusal=rows_triton.rms_norm_refusal,
        ),
        PLAIN,
    ),
    switch="linear",
)
LINEAR = Operation(
    "linear layers",
    (
        Backend(
            "cpu",
            "compiled: reads the weights once for a few rows; bf16 on matrix units (AMX) for any number",
            partial(_compiled, "linear"),
            cpu_linear.operator,
            cpu_linear.layer_refusal,
            cpu_linear.rows_refusal,
            cpu_linear.linear,
        ),
        Backend(
            "cpu_bf16",
            WIDENED,
            _widened,
            cpu_dequantize.linear,
            cpu_dequantize.linear_refusal,
        ),
        Backend(
            "onednn",
            "fp32 products with gradients by oneDNN instead of MKL",
            lambda module: linear_onednn.tensor_refusal(_weight(module)),
            _onednn,
            call_refusal=_onednn_layer,
            trains=True,
        ),
        PLAIN,
    ),
    ("",),
    switch="linear",
)
MLP = Operation(
    "dense networks",
    (
        Backend(
            "cpu",
            "compiled: one pass over the weights",
            partial(_compiled, "linear"),
            cpu_mixture.mlp,
            _compiled_mlp,
            lambda x, mlp: cpu_linear.dense_rows_refusal(x, mlp.gate_proj.weight),
            undispatched=cpu_mixture.undispatched_mlp,
        ),
        Backend(
            "cpu_bf16",
            WIDENED,
            _widened_in_tiles,
            cpu_dequantize.whole_mlp,
            _widened_mlp,
        ),
        Backend("layers", "layer after layer"),
    ),
    MLP_PARTS,
    switch="linear",
)
ROUTER = Operation(
    "router",
    (
        Backend(
            "cpu",
            "compiled: scores and choice in one call",
            partial(_compiled, "linear"),
            cpu_router.operator,
            cpu_router.route_refusal,
            undispatched=cpu_router.route,
        ),
        PLAIN,
    ),
    switch="linear",
)
# Where it takes no call, the routed experts' own operation and the dense network's follow
MIXTURE = Operation(
    "experts with shared ones",
    (
        Backend(
            "cpu",
            "compiled: routed and shared experts in one pass",
            cpu_mixture.moe_refusal,
            cpu_mixture.mixture,
            _compiled_mixture,
            cpu_mixture.rows_refusal,
            undispatched=cpu_mixture.undispatched,
        ),
        Backend(
            "cpu_bf16",
            WIDENED,
            lambda moe: cpu_mixture.moe_refusal(moe) or _widened_in_tiles(moe),
            cpu_dequantize.whole_mixture,
            _widened_mixture,
        ),
        Backend("parts", "routed experts and shared ones, each by itself"),
    ),
    ("experts", "experts.act_fn", "shared_experts", *(f"shared_experts.{part}" for part in MLP_PARTS)),
)
EXPERTS = Operation(
    "experts",
    (
        _experts(
            triton_support.NAME,
            "Triton programs for GPUs: sorted on the device, reads the chosen experts' weights once",
            experts_triton.module_refusal,
            function=_module_first(experts_triton.triton_experts),
            call_refusal=_triton_routed,
            trains=True,
        ),
        _experts(
            cpu_mixture.NAME,
            "compiled: one pass, reads the chosen experts' weights once",
            _compiled_experts,
            function=cpu_mixture.routed,
            refusal=_compiled_routed,
            call_refusal=cpu_mixture.rows_refusal,
            undispatched=cpu_mixture.undispatched_routed,
        ),
        Backend(
            "cpu_bf16",
            WIDENED,
            _widened,
            cpu_dequantize.experts,
            cpu_dequantize.experts_refusal,
        ),
        _experts(
            experts_grouped.NAME,
            "for training on a CPU: gradients in place, of chosen experts only",
            partial(_of_transformers, experts_grouped.module_refusal),
            function=_module_first(experts_grouped.grouped_experts),
            call_refusal=_grouped_routed,
            trains=True,
        ),
        _experts(
            "batched_mm",
            "copies the weights of each token's experts, for few tokens on a GPU",
            partial(_of_transformers, always),
            function=_by_transformers("batched_mm"),
            call_refusal=_batched_mm_routed,
            trains=True,
        ),
        _experts(
            "grouped_mm",
            "one grouped product over tokens sorted by expert",
            partial(_of_transformers, public_kernels.grouped_mm_refusal),
            function=_by_transformers("grouped_mm"),
            call_refusal=_grouped_mm_routed,
            trains=True,
        ),
        _experts(
            "eager",
            "one expert after another",
            function=_by_transformers("eager"),
            call_refusal=_eager_routed,
            trains=True,
        ),
        _experts(
            experts_liger.NAME,
            "Liger-Kernel, for training on a GPU; waits for the GPU once a call",
            partial(_of_transformers, experts_liger.module_refusal),
        ),
        _experts(
            "deepgemm",
            "DeepGEMM from the Hub, for inference",
            partial(_of_transformers, public_kernels.deepgemm_refusal),
        ),
        _experts("sonicmoe", "SonicMoE from the Hub", partial(_of_transformers, public_kernels.sonicmoe_refusal)),
        _experts("auto", "the first from triton to eager that takes a call"),
    ),
)
ADAPTED = Operation(
    "experts under LoRA",
    (
        Backend(
            "cpu",
            "gradients in place, of the adapters of chosen experts only",
            experts_lora.loop_refusal,
            experts_lora.loop_experts,
            call_refusal=experts_lora.loop_call_refusal,
            trains=True,
        ),
        Backend(
            "grouped_mm",
            "grouped products with thin ones beside them",
            experts_lora.grouped_refusal,
            experts_lora.grouped_mm_experts,
            call_refusal=experts_lora.grouped_call_refusal,
            trains=True,
        ),
        Backend(
            "eager",
            "one expert after another",
            experts_lora.frozen_refusal,
            experts_lora.eager_experts,
            trains=True,
        ),
        Backend("peft", "PEFT's own: adapters times adapters, of the size of all experts' weights"),
    ),
)
STEP = Operation(
    "decoding step",
    (
        # Not asked by `serve`: `models/dsv3/decoding_dsv3.py` asks, of the whole model
        Backend(
            "program",
            "compiled: all layers in one call, on threads that stay awake",
            _program,
            cpu_step.Program.run,
        ),
        Backend(
            "graph",
            "compiled whole, one launch of a CUDA graph a token",
            whole_step.model_refusal,
            choice='generate(…, cache_implementation="static")',
        ),
        Backend("layers", "layer after layer, over a cache that grows"),
    ),
)

# Not computed, but asked for where weights are read and caches grow
PAGES = Operation(
    "pages",
    (
        Backend("huge", "of 2 MiB, asked for by madvise", lambda model: pages.refusal()),
        Backend("normal", "the system's own", choice="TRANSFORMERS_DSV3_BACKENDS=pages=normal"),
    ),
)
