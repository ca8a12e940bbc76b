"""How much memory compressing takes, from shapes alone, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..evaluation.machine import resident_bytes
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from .compressed_layout import Layout


# What allocators keep back and libraries take for themselves
_SLACK = 256 << 20


def memory_needed(
    config: DeepseekV3Config, tensors: Mapping[str, StoredTensor], layout: Layout, tokens_at_once: int | None
) -> int:
    """Bytes at the peak, those of the program itself included.

    Args:
        tokens_at_once: that run through a layer; None where the text is not needed.
    """
    file = max(sum(tensors[name].nbytes for name in names) for names in layout.files)
    file = min(file, max(_packed(layout, tensors, names) for names in layout.files))
    rounding, largest = 0, 0
    for name in layout.bits:
        rows, width = tensors[name].shape
        values = rows * width
        # As stored, the embedding's whole numbers and their packed form; of others what is rounded, and what it means
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "head.weight")) or tokens_at_once is None:
            rounding = max(rounding, tensors[name].nbytes + 3 * values)
        else:
            rounding = max(rounding, tensors[name].nbytes + 10 * values + 4 * width**2)
            largest = max(largest, width)
    running = 0
    if tokens_at_once is not None:
        heads, hidden = config.num_attention_heads, config.hidden_size
        attention = sum(
            math.prod(tensors[name].shape) for name in tensors if name.startswith("model.layers.0.self_attn.")
        )
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        per_token = 4 * hidden + heads * (5 * query + 2 * (config.qk_nope_head_dim + config.v_head_dim))
        inputs = hidden**2 + (config.q_lora_rank or 0) ** 2 + (heads * config.v_head_dim) ** 2
        running = 4 * (attention + tokens_at_once * per_token + inputs)
        widest = max(config.intermediate_size, config.moe_intermediate_size * max(config.n_shared_experts, 1))
        network = 4 * (3 * widest * hidden + tokens_at_once * (2 * hidden + 4 * widest) + widest**2)
        # A Hessian, twice in fp64 while it is inverted, and the result
        running = max(running, network) + 0
        rounding = max(rounding, 28 * largest**2)
    return (resident_bytes()["now"] or 0) + _SLACK + 2 * file + max(running, rounding) + min(running, rounding) // 2


def _packed(layout: Layout, tensors: Mapping[str, StoredTensor], names: list[str]) -> int:
    return sum(
        math.prod(tensors[name].shape) * layout.bits[name] // 8 + math.prod(tensors[name].shape) // 16
        if name in layout.bits
        else tensors[name].nbytes
        for name in names
    )
