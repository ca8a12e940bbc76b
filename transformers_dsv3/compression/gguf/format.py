"""The GGUF format of llama.cpp's `deepseek2` architecture: tensor names, number types and blocks, both ways.

Shape suffixes: H heads, R rank of the latents, N and V widths of a head's position-free keys and of its values. A GGUF
file lists dimensions fastest first; shapes here are torch's.

Q8_0 and Q4_0 are groups of 32 weights along the input. A block is the group's fp16 scale, then 32 int8, or 16 bytes of
two whole numbers each: those of `quantized_weights`, but for the scale, which stands before its numbers.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ...kernels.cpu.operators import GROUP
from ...models.dsv3.checkpoint_conversion_dsv3 import official_name
from ..quantized_weights import quantize_groups


ARCHITECTURE = "deepseek2"

# Names of number types in a file's table of tensors
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
BITS = {Q4_0: 4, Q8_0: 8}
TYPE_NAMES = {F32: "F32", F16: "F16", BF16: "BF16", Q4_0: "Q4_0", Q8_0: "Q8_0"}
# Bytes of a block of 32: the scale, and the whole numbers
BLOCK_BYTES = {Q4_0: 2 + GROUP // 2, Q8_0: 2 + GROUP}

# Official names without `model.` and, in layers, without `layers.{i}.`
_GLOBAL = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
    # Of MTP layers
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_norm.weight": "shared_head.norm.weight",
}
# Stacked in a file, and one by one in official checkpoints
EXPERTS = {"ffn_gate_exps.weight": "gate_proj", "ffn_up_exps.weight": "up_proj", "ffn_down_exps.weight": "down_proj"}
GATE_UP_EXPERTS = "ffn_gate_up_exps.weight"
# `kv_b_proj` in two parts, keys (H, R, N) and values (H, V, R); older files have it whole
KEY_PART, VALUE_PART, KEY_VALUE = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"
KV_B = "self_attn.kv_b_proj.weight"

_NAMES = {official: name for table in (_GLOBAL, _LAYER) for name, official in table.items()}


def gguf_name(official: str) -> str | None:
    """The name in a GGUF file of an official tensor, with or without `model.`; None for experts, `kv_b_proj` and what
    such files do not have.
    """
    layer, rest = split_layer(official)
    name = _NAMES.get(rest)
    if name is None or (layer is None) != (name in _GLOBAL):
        return None
    return name if layer is None else f"blk.{layer}.{name}"


def split_layer(official: str) -> tuple[int | None, str]:
    """An official name to the number of its layer, where it is in one, and what follows that."""
    rest = official.removeprefix("model.")
    match = re.match(r"layers\.(\d+)\.", rest)
    return (None, rest) if match is None else (int(match[1]), rest[match.end() :])


def sources_of(parameter: str, config: Any, present: Any) -> list[str]:
    """What in a GGUF file a parameter of a model is made of: one tensor, or those that are joined along their rows.

    Args:
        parameter: its name in the model, where experts are stacked and MTP layers stand by themselves.
        config: the model's.
        present: names in the file, which may have some tensors whole or in parts.
    """
    official = official_name(parameter, config)
    layer, rest = split_layer(official)
    block = f"blk.{layer}."
    if rest == KV_B:
        parts = [block + KEY_PART, block + VALUE_PART]
        return [block + KEY_VALUE] if block + KEY_VALUE in present else parts
    if rest == "mlp.experts.gate_up_proj":
        parts = [f"{block}ffn_gate_exps.weight", f"{block}ffn_up_exps.weight"]
        return [block + GATE_UP_EXPERTS] if block + GATE_UP_EXPERTS in present else parts
    if rest == "mlp.experts.down_proj":
        return [f"{block}ffn_down_exps.weight"]
    name = gguf_name(official)
    return [] if name is None else [name]


def split_kv_b(weight: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv_b_proj` `(H * (N + V), R)` to its keys `(H, R, N)` and values `(H, V, R)`."""
    heads = weight.unflatten(0, (config.num_attention_heads, -1))
    keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return keys.transpose(1, 2).contiguous(), values.contiguous()


def join_kv_b(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Reverses `split_kv_b`."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def row_bytes(ggml_type: int, width: int) -> int:
    """Bytes of a row of weights in one of the types of `TYPE_NAMES`; quantised ones are a multiple of 32 wide."""
    if ggml_type in FLOATS:
        return width * FLOATS[ggml_type].itemsize
    return width // GROUP * BLOCK_BYTES[ggml_type]


def pack_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantised weights to blocks.

    Args:
        values, scale: as `quantize_groups` returns them, of weights `(N, K)`.

    Returns:
        uint8 `(N, bytes of a row)`.
    """
    groups = values.view(torch.uint8).unflatten(-1, (scale.shape[-1], -1))
    return torch.cat([scale.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)), groups], dim=-1).flatten(-2)


def unpack_blocks(rows: torch.Tensor, ggml_type: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reverses `pack_blocks`: uint8 `(N, bytes of a row)` to values and scales."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES[ggml_type]))
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    values = blocks[..., 2:].contiguous().flatten(-2)
    return (values if ggml_type == Q4_0 else values.view(torch.int8)), scale


def encode(weight: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """Weights `(..., K)` of any floating dtype to the bytes of a type, uint8 `(..., bytes of a row)`.

    Raises:
        ValueError: as `quantize_groups` does.
    """
    if ggml_type in FLOATS:
        return weight.to(FLOATS[ggml_type]).contiguous().view(torch.uint8)
    return pack_blocks(*quantize_groups(weight, BITS[ggml_type]))
