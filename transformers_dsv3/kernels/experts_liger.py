"""`experts_implementation="liger"`: the fused mixture of experts of Liger-Kernel, Triton programs for GPUs.

It trains experts as well as it serves them. Three things set it apart from what `auto` uses: it is tuned when it first
meets a shape (`LIGER_FUSED_MOE_AUTOTUNE=0` leaves that out), it waits for the GPU once a call to learn how many tiles
there are, so that no CUDA graph can hold it, and gradients of mixing weights are summed in the activations' dtype.
"""

import functools
import importlib.metadata
import importlib.util

import torch
from packaging import version
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import selection
from .cpu.mixture import experts_refusal
from .selection import PLAIN
from .triton_support import device_refusal


NAME = "liger"
# The first whose offsets into large stacks of weights are 64 bits wide
OLDEST = "0.8.1"


@functools.cache
def _missing() -> str | None:
    install = f'needs `pip install "liger-kernel>={OLDEST}"`'
    if importlib.util.find_spec("liger_kernel") is None:
        return install
    installed = importlib.metadata.version("liger-kernel")
    return None if version.parse(installed) >= version.parse(OLDEST) else f"{install}, {installed} is installed"


def module_refusal(module: nn.Module) -> str | None:
    """The reason why `liger_experts` cannot serve a module of experts, or None where it can."""
    if (reason := experts_refusal(module)) is not None:
        return reason
    weights = (module.gate_up_proj, module.down_proj)
    for weight in weights:
        if type(weight) not in PLAIN and is_traceable_wrapper_subclass(weight):
            return f"takes plain tensors, not {type(weight).__name__}"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes fp32, bf16 and fp16 weights, not {weight.dtype}"
    if weights[0].dtype != weights[1].dtype:
        return "takes weights of one dtype"
    if not getattr(module, "is_concatenated", True):
        return "takes gates above ups, not in turns"
    return device_refusal(weights[0]) or _missing()


def call_refusal(module: nn.Module, hidden_states: torch.Tensor, top_k_weights: torch.Tensor) -> str | None:
    """The reason why `liger_experts` leaves a call to others, or None where it serves it itself."""
    if torch.compiler.is_compiling():
        return "waits for the GPU, which torch.compile cannot trace"
    if (reason := module_refusal(module)) is not None:
        return reason
    if hidden_states.dtype != module.gate_up_proj.dtype:
        return f"takes activations of the weights' dtype ({module.gate_up_proj.dtype}), not {hidden_states.dtype}"
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "does not follow autocast"
    if (reason := selection.call_refusal()) is not None:
        return reason
    if not len(hidden_states):
        return "takes one token at least"
    if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled() and top_k_weights.requires_grad:
        return "sums gradients of mixing weights in any order, and deterministic algorithms were asked for"
    return None


def liger_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs `(T, D)`, as Transformers' experts functions compute it."""
    from liger_kernel.ops import LigerFusedMoEFunction

    # Index E, an expert of another rank, would be read and counted past the end: any expert with weight 0 instead
    elsewhere = top_k_index >= module.num_experts
    return LigerFusedMoEFunction.apply(
        hidden_states,
        module.gate_up_proj,
        module.down_proj,
        top_k_index.masked_fill(elsewhere, 0).to(torch.int32),
        top_k_weights.masked_fill(elsewhere, 0),
    )
