"""The files of a compressed checkpoint, each written as soon as it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..files import partial_path, put_in_place
from .compressed_layout import Layout, is_embedding
from .gptq import Rounded
from .packed.format import byte_tensors, packed_tensors


# Weights that are packed at once: on its way each is several times as large
_PACKED_AT_ONCE = 1 << 22


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
            put_in_place(partial, path)  # before a step counts as done


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
