"""Experts under PEFT's LoRA on their stacked weights (`target_parameters`), without PEFT's full-size sums.

PEFT wraps the module of experts once for each adapted weight, and each wrapper's forward replaces the weight by its
sum with the adapter's product, `(E, out, in)`. Where that is all a wrapper would do, the adapter's two factors are
read from it and applied to tokens instead. All else (merging, saving, switching adapters) stays PEFT's own.
"""

import sys
from typing import Any

import torch
from torch import nn

from ...kernels.experts_lora import LowRank, frozen_refusal
from ...kernels.selection import bypass_refusal, call_refusal, is_plain


def factors_of(wrapper: Any, adapters: list[str]) -> LowRank:
    """The sum of some adapters of a wrapper as one, of the sum of their ranks."""
    downs, ups = [], []
    for adapter in adapters:
        # As PEFT lays them out: expert by expert, and rank by rank with the experts innermost
        downs.append(wrapper.lora_A[adapter].weight.unflatten(0, (wrapper.num_experts, -1)))
        up_ORE = wrapper.lora_B[adapter].weight.unflatten(1, (-1, wrapper.num_experts))
        ups.append(up_ORE.permute(2, 0, 1) * wrapper.scaling[adapter])
    return LowRank(torch.cat(downs, dim=1), torch.cat(ups, dim=2))


# PEFT's modules that compute the folded weights
FOLDING = ("_LoraFactorsProxy", "_LoraParameterProxy")


def _folding_refusal() -> str | None:
    """The reason why PEFT has to fold adapters into weights itself, or None where it need not.

    Where the forward of a module that does so was replaced, it was for what it sees or computes.
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    if layer is None or torch.compiler.is_compiling():
        return None
    for name in FOLDING:
        forward = getattr(getattr(layer, name, None), "forward", None)
        if forward is not None and (forward.__module__ != layer.__name__ or hasattr(forward, "__wrapped__")):
            return f"{name}.forward of PEFT was replaced"
    return None


def adapted_experts(module: nn.Module) -> tuple[nn.Module, dict[str, LowRank]] | None:
    """The plain module within PEFT's wrappers, and what is added to each of its weights.

    Args:
        module: whatever stands where the experts were.

    Returns:
        The experts and, by the weight's name, the adapters' factors. None where the wrappers have to be called as they
        are: without an active adapter, merged, around trained weights or another library's quantised ones, of another
        kind, or hooked (PEFT's batches of mixed adapters; accelerate's offloading, which also replaces `forward`).
    """
    found: dict[str, LowRank] = {}
    while type(module).__name__ == "ParamWrapper":
        wrapper: Any = module
        adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.disable_adapters or wrapper.merged or bypass_refusal("experts", wrapper) is not None:
            return None
        if adapters:
            found[wrapper.parameter_name] = factors_of(wrapper, adapters)
        module = wrapper.base_layer
    if found and _folding_refusal() is not None:
        return None
    if not found or not found.keys() <= {"gate_up_proj", "down_proj"} or not is_plain(type(module), "experts"):
        return None
    if bypass_refusal("experts", module) is not None or call_refusal() is not None:
        return None
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, nn.Parameter) or weight.is_meta or frozen_refusal(module) is not None:
            return None
    return module, found
