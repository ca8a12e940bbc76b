"""What rounding to few bits makes of a model, without packing it: for measurements beside the bytes of a plan."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.cpu.operators import GROUP
from .plan import WHOLE, Settings


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights `(..., K)` rounded to whole numbers of `bits` bits times a scale for each group of 32, as such again.

    The scale, which bf16 holds, makes the largest of a group the lowest whole number, with the sign that takes.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    lowest = -(1 << (bits - 1))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = (largest / lowest).bfloat16().float()
    whole = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(lowest, -lowest - 1)
    return (whole * scale).flatten(-2).to(weight.dtype)


@torch.no_grad()
def round_weights(model: nn.Module, settings: Settings) -> nn.Module:
    """Rounds the weights of a model in place, each to the nearest, as a compressed file holds them.

    Args:
        model: of this package, in any floating dtype.
        settings: bits of each kind of weights; nothing is pruned.

    Returns:
        The same model.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("gate.weight", "kv_b_proj.weight")):
            continue
        is_head = "embed_tokens" in name or name.startswith("lm_head")
        bits = settings.of("experts" if ".experts." in name else "head" if is_head else "linear")
        if bits != WHOLE:
            parameter.copy_(nearest(parameter, bits))
    return model
