"""How much memory compressing takes, from shapes alone, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..memory import resident_bytes
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from .compressed_layout import Layout, kind_of
from .gptq import WIDEST_IN_FP64
from .settings import CompressionSettings


# What allocators keep back and libraries take for themselves
_SLACK = 256 << 20
# Rounded without inputs
_NEAREST = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")


def memory_needed(
    config: DeepseekV3Config, tensors: Mapping[str, StoredTensor], layout: Layout, at_once: int | None
) -> int:
    """Bytes at the peak, those of the program itself included; an upper bound.

    Args:
        at_once: tokens that run through a layer; None where the text is not needed.
    """
    base = (resident_bytes()["now"] or 0) + _SLACK
    return base + max(_of_step(config, tensors, layout, step, at_once) for step in layout.steps)


def weights_left(tensors: Mapping[str, StoredTensor], share: float) -> int:
    """Weights that are left when a share of the routed experts is removed."""
    experts = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if kind_of(name) == "experts")
    return sum(math.prod(tensor.shape) for tensor in tensors.values()) - round(share * experts)


def pruning_memory(
    config: DeepseekV3Config, tensors: Mapping[str, StoredTensor], settings: CompressionSettings
) -> int:
    """Bytes that `prune_and_heal` takes, but for activations, those of the program itself included."""
    base = (resident_bytes()["now"] or 0) + _SLACK
    weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if settings.heal:
        # The unpruned model in fp32, and what is left with gradients and the optimizer's two moments; logits of a
        # batch of four windows of both, in several forms
        logits = 6 * 4 * settings.window * config.vocab_size
        return base + 4 * (weights + 4 * weights_left(tensors, settings.prune) + logits)
    if settings.prune_by == "random":  # shard by shard
        shards: dict[str, int] = {}
        for tensor in tensors.values():
            shards[tensor.path] = shards.get(tensor.path, 0) + tensor.nbytes
        return base + max(shards.values())
    return base + sum(math.prod(tensor.shape) * max(tensor.dtype.itemsize, 2) for tensor in tensors.values())


def _of_step(
    config: DeepseekV3Config,
    tensors: Mapping[str, StoredTensor],
    layout: Layout,
    step: list[int],
    at_once: int | None,
) -> int:
    files = [layout.files[number] for number in step]
    written = 2 * max(_bytes(layout, tensors, names) for names in files)
    rounding = attention = inner = widest = 0
    for name in (name for names in files for name in names):
        tensor = tensors[name]
        values = math.prod(tensor.shape)
        if ".self_attn." in name:
            attention += values
        if kind_of(name) is None or not values:
            continue
        if at_once is None or name.endswith(_NEAREST):  # the whole numbers, and their packed form on its way
            rounding = max(rounding, tensor.nbytes + 3 * values)
            continue
        # As it is stored, as it changes while it is rounded, and what it stands for then
        rounding = max(rounding, tensor.nbytes + 14 * values + 4 * tensor.shape[1] ** 2)
        widest = max(widest, tensor.shape[1])
        if name.endswith("gate_proj.weight"):
            inner = max(inner, tensor.shape[0])
    if at_once is None or not widest:
        return written + rounding
    heads, hidden, value = config.num_attention_heads, config.hidden_size, config.v_head_dim
    a_token = 6 * hidden + heads * (8 * config.qk_nope_head_dim + 6 * config.qk_rope_head_dim + 2 * value)
    hessians = hidden**2 + (config.q_lora_rank or 0) ** 2 + (heads * value) ** 2
    attending = attention + at_once * a_token + hessians
    network = 3 * inner * hidden + at_once * (2 * hidden + 4 * inner) + inner**2 + hidden**2
    # The Hessian, its factor, and the inverse of that
    factorising = (28 if widest <= WIDEST_IN_FP64 else 20) * widest**2
    return written + 4 * max(attending, network) + max(rounding, factorising)


def _bytes(layout: Layout, tensors: Mapping[str, StoredTensor], names: list[str]) -> int:
    """Of a file."""
    return sum(
        math.prod(tensors[name].shape) * layout.bits[name] // 8 + math.prod(tensors[name].shape) // 16
        if name in layout.bits
        else tensors[name].nbytes
        for name in names
    )
