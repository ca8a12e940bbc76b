"""Tensors and config of compressed-tensors' `pack-quantized` format, groups of 32 along the input, symmetric.

A weight `X.weight` `(N, K)` of whole numbers q of b bits and scales is three tensors: `X.weight_packed` int32
`(N, K * b / 32)` is one string of bits a row, element after element from the lowest bit on, each q + 2^(b-1);
`X.weight_scale` bf16 `(N, K / 32)`; `X.weight_shape` int64 `(2,)` holds N and K. Routed experts are written one by
one, as in the release of Kimi-K2-Thinking. Embeddings are written in the format `int-quantized` instead, q in int8 as
`X.weight`: Transformers cannot open packed ones, since it looks for their `weight`. At 4 and 8 bits the values are
those of GGUF's Q4_0 and Q8_0, in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...kernels.cpu.operators import GROUP


FORMAT, BYTES_FORMAT, SEVERAL_FORMATS = "pack-quantized", "int-quantized", "mixed-precision"
METHOD = "compressed-tensors"


def pack(whole: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers int8 `(..., N, K)`, `-2^(bits-1) <= q < 2^(bits-1)`, K a multiple of 32, to int32
    `(..., N, K * bits / 32)`.
    """
    if bits in (4, 8):  # as bytes, some ten times as fast
        elements = whole.contiguous().view(torch.uint8) ^ (1 << (bits - 1))
        if bits == 4:
            elements = elements[..., ::2] & 15 | elements[..., 1::2] << 4
        return elements.view(torch.int32)
    elements = whole.unflatten(-1, (-1, GROUP)).to(torch.int64) + (1 << (bits - 1))
    words = torch.zeros(*elements.shape[:-1], bits, dtype=torch.int64, device=whole.device)
    for i in range(GROUP):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= elements[..., i] << offset & 0xFFFFFFFF
        if offset + bits > 32:
            words[..., word + 1] |= elements[..., i] >> (32 - offset)
    return words.to(torch.int32).flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Reverses `pack`: int32 `(..., N, K * bits / 32)` to int8 `(..., N, K)`."""
    if bits in (4, 8):
        read = packed.contiguous().view(torch.uint8)
        if bits == 4:
            return torch.stack([read & 15, read >> 4], dim=-1).flatten(-2).view(torch.int8) - 8
        return (read ^ 128).view(torch.int8)
    words = packed.unflatten(-1, (-1, bits)).to(torch.int64) & 0xFFFFFFFF
    elements = torch.empty(*words.shape[:-1], GROUP, dtype=torch.int8, device=packed.device)
    for i in range(GROUP):
        word, offset = divmod(i * bits, 32)
        element = words[..., word] >> offset
        if offset + bits > 32:
            element = element | words[..., word + 1] << (32 - offset)
        elements[..., i] = (element & ((1 << bits) - 1)) - (1 << (bits - 1))
    return elements.flatten(-2)


def packed_tensors(name: str, whole: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The three tensors of one weight.

    Args:
        name: of the weight, `….weight`.
        whole: int8 `(N, K)`. scale: `(N, K / 32)`, values that bf16 holds.
        bits: of one weight, 1 to 8.
    """
    return {
        f"{name}_packed": pack(whole, bits),
        f"{name}_scale": scale.bfloat16(),
        f"{name}_shape": torch.tensor(whole.shape, dtype=torch.int64),
    }


def byte_tensors(name: str, whole: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two tensors of an embedding, arguments as `packed_tensors` takes them."""
    return {name: whole, f"{name}_scale": scale.bfloat16()}


def packed_config(
    targets: Mapping[int, Iterable[str]],
    ignore: Iterable[str],
    embeddings: Mapping[int, Iterable[str]] | None = None,
) -> dict[str, Any]:
    """`quantization_config` of such a checkpoint.

    Args:
        targets: bits of one weight to the modules that have so many: names, `re:` patterns of names, or class names.
            Native takes the bits of routed experts from the first group with a pattern that has the word `experts`,
            else from the first with anything but patterns.
        ignore: modules that are not quantised though a target takes them, in the same terms.
        embeddings: as `targets`, modules whose tensors are `byte_tensors`.
    """
    kinds = [(bits, modules, FORMAT) for bits, modules in sorted(targets.items())]
    kinds += [(bits, modules, BYTES_FORMAT) for bits, modules in sorted((embeddings or {}).items())]
    groups = {
        f"group_{i}": {
            "targets": list(modules),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": form,
        }
        for i, (bits, modules, form) in enumerate(kinds)
    }
    return {
        "quant_method": METHOD,
        "format": SEVERAL_FORMATS if embeddings else FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
