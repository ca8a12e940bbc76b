"""Weights of a checkpoint one at a time, and the files of a compressed one, each written as soon as it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..files import partial_path
from ..models.dsv3.checkpoint_checks_dsv3 import SCALE
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor
from .compressed_layout import Layout, is_embedding
from .gptq import Rounded
from .packed_format import byte_tensors, packed_tensors
from .quantizer_fp8 import dequantize_blocks


# Weights that are packed at once: on its way each is several times as large
_PACKED_AT_ONCE = 1 << 22


class WeightSource:
    """Tensors of an official checkpoint, each read when it is asked for.

    Args:
        tensors: by name.
        block_size: rows and columns of the blocks of FP8 weights; None where there are none.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], block_size: tuple[int, int] | None):
        self.tensors, self.block_size = tensors, block_size
        self.files = sorted({tensor.path for tensor in tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """In the dtype on disk; weights in FP8 as the bf16 that they stand for."""
        weight = self.tensors[name].read()
        scale = self.tensors.get(name + SCALE)
        if scale is None or self.block_size is None:
            return weight
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        return dequantize_blocks(weight, scale.read(), self.block_size, out)


class CompressedFiles:
    """Writes the files of a layout.

    Args:
        folder: where to. A file has its name when it is whole.
        bar: a progress bar over weights.
    """

    def __init__(self, layout: Layout, folder: Path, bar: Any):
        self.layout, self.folder, self.bar = layout, folder, bar
        self._file_of = {name: number for number, names in enumerate(layout.files) for name in names}
        self._missing = {number: set(names) for number, names in enumerate(layout.files)}
        self._held: dict[int, dict[str, torch.Tensor]] = {}

    def put(self, name: str, weight: torch.Tensor | Rounded) -> None:
        """Takes a tensor: as it is to be stored, or rounded to the bits that the layout has for it."""
        if isinstance(weight, Rounded):
            tensors = _packed(name, weight, self.layout.bits[name])
            self.bar.update(weight.whole.numel())
        else:
            tensors = {name: weight.contiguous()}
        number = self._file_of[name]
        self._held.setdefault(number, {}).update(tensors)
        self._missing[number].remove(name)
        if not self._missing[number]:
            path = self.folder / self.layout.file_name(number)
            partial = partial_path(path)
            save_file(self._held.pop(number), partial, metadata={"format": "pt"})
            partial.replace(path)


def _packed(name: str, rounded: Rounded, bits: int) -> dict[str, torch.Tensor]:
    if is_embedding(name):
        return byte_tensors(name, rounded.whole, rounded.scale)
    step = max(1, _PACKED_AT_ONCE // rounded.whole.shape[1])
    parts = [
        packed_tensors(name, whole, scale, bits)
        for whole, scale in zip(rounded.whole.split(step), rounded.scale.split(step), strict=True)
    ]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    tensors[f"{name}_shape"] = torch.tensor(rounded.whole.shape, dtype=torch.int64)
    return tensors
