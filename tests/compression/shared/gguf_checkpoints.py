"""Checkpoints and tokenizers that tests write as GGUF files, and what such files hold."""

import gguf
import torch


# Widths that groups of 32 divide
WIDTHS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "v_head_dim": 16,
}


def tensors_of(path):
    """Every tensor of a GGUF file as llama.cpp's package reads it: its type's name and its bytes."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def values_of(path):
    """Every tensor of a GGUF file in fp32, dequantised by llama.cpp's package, in torch's order of dimensions."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(t.shape)]
        found[t.name] = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).reshape(shape)
    return found


def field(path, key):
    """One value of a GGUF file's metadata."""
    found = gguf.GGUFReader(path).fields.get(key)
    return None if found is None else found.contents()
