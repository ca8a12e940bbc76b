"""`experts_implementation="auto"`: for each call, the first of the backends that takes it, fastest first."""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import experts_cpu, experts_grouped, experts_triton, triton_support
from .selection import call_refusal, logger


NAME = "auto"


def grouped_mm_refusal(module: nn.Module) -> str | None:
    """The reason why Transformers' `grouped_mm` cannot serve a module of experts, or None where it can."""
    weight = next(module.parameters())
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16 weights, not {weight.dtype}"
    if weight.is_cuda and triton_support.compute_capability(weight.device.index) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def auto_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs `(T, D)`, as Transformers' experts functions compute it.

    On a GPU `triton`, with gradients or without. On a CPU the compiled backend where no gradient is needed,
    `grouped_cpu` for training. What these leave: `batched_mm` for a few tokens on a GPU, where `generate` would switch
    to it; `grouped_mm`; else the module's own plain loop.
    """
    if (
        experts_triton.may_serve(NAME, hidden_states)
        and experts_triton.experts_refusal(module, hidden_states, top_k_weights) is None
    ):
        return experts_triton.triton_experts(module, hidden_states, top_k_index, top_k_weights)
    if not module.training and experts_cpu.mixture_refusal(hidden_states, module, top_k_weights, None) is None:
        return experts_cpu.mixture(hidden_states, module, top_k_index, top_k_weights, None)
    if (
        experts_grouped.why_not(module) is None
        and call_refusal() is None
        and (hidden_states.dtype == module.gate_up_proj.dtype or torch.is_autocast_enabled("cpu"))
    ):
        return experts_grouped.grouped_experts(module, hidden_states, top_k_index, top_k_weights)
    name = "eager"
    if grouped_mm_refusal(module) is None:
        few = not torch.is_grad_enabled() and top_k_index.numel() <= module.num_experts
        name = "batched_mm" if few and hidden_states.device.type != "cpu" else "grouped_mm"
    plain = type(module).forward.__wrapped__
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, plain)(module, hidden_states, top_k_index, top_k_weights)


def cpu_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The same, asked for by the name of the compiled backend: says once why where another has to take a call."""
    reason = experts_cpu.mixture_refusal(hidden_states, module, top_k_weights, None)
    if reason is not None and not torch.compiler.is_compiling():
        logger.warning_once(f'experts_implementation="{experts_cpu.NAME}" does not serve a call: it {reason}.')
    return auto_experts(module, hidden_states, top_k_index, top_k_weights)


def triton_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The same, asked for by the name of Triton's programs, which are interpreted on a CPU."""
    reason = experts_triton.experts_refusal(module, hidden_states, top_k_weights)
    if reason is None:
        return experts_triton.triton_experts(module, hidden_states, top_k_index, top_k_weights)
    if not torch.compiler.is_compiling():
        logger.warning_once(f'experts_implementation="{triton_support.NAME}" does not serve a call: it {reason}.')
    return auto_experts(module, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Makes `experts_implementation="auto"`, `"cpu"` and `"triton"` known to Transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, auto_experts)
    ALL_EXPERTS_FUNCTIONS.register(experts_cpu.NAME, cpu_experts)
    ALL_EXPERTS_FUNCTIONS.register(triton_support.NAME, triton_experts)
