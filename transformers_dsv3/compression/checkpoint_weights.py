"""Weights of a checkpoint on disk, a few rows at a time: floats, DeepSeek's FP8 blocks, compressed-tensors' codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..kernels.cpu.operators import GROUP
from ..models.dsv3.checkpoint_checks_dsv3 import SCALE, scale_grid
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor
from .packed_format import BYTES_FORMAT, FORMAT, METHOD, unpack
from .quantizer_fp8 import dequantize_blocks


# Weights converted at once; a row at least, and of FP8 a row of blocks
_CHUNK = 16 << 20


class CheckpointWeights:
    """Reads the weights of a checkpoint by their official names, whatever they are stored as.

    Args:
        stored: the checkpoint's tensors, not read yet.
        quantization: `quantization_config` of its config; None where it has none.

    Raises:
        CheckpointError: for a quantization that is not read here, in one line.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None):
        self.stored = stored
        fields = dict(quantization or {})
        method = fields.get("quant_method")
        block = fields.get("weight_block_size")
        self.block_size: tuple[int, int] | None = (int(block[0]), int(block[1])) if method == "fp8" and block else None
        # "mixed-precision" where the groups differ, each of which has a format of its own then
        groups = (fields.get("config_groups") or {}).values()
        formats = {group.get("format") or fields.get("format") for group in groups} or {fields.get("format")}
        if not (method is None or self.block_size or (method == METHOD and formats <= {FORMAT, BYTES_FORMAT})):
            kind = f"{method}, {fields['format']}" if fields.get("format") else method
            raise CheckpointError(
                f"its quantization_config is {kind}; read here are DeepSeek's FP8 blocks and {METHOD}' {FORMAT}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.stored or f"{name}_packed" in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, not of what is stored of it."""
        if name in self.stored:
            return self.stored[name].shape
        return tuple(self.stored[f"{name}_shape"].read().tolist())

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with what is stored of a weight of that shape, from headers; None where nothing is."""
        if name not in self:
            return f"'{name}' is missing"
        if (tensor := self.stored.get(name)) is not None:
            if tensor.shape != shape:
                return f"{tensor.path}: '{name}' has shape {tensor.shape}, the config asks for {shape}"
            if tensor.dtype_name == "F8_E4M3":
                scale = self.stored.get(name + SCALE)
                if self.block_size is None or scale is None:
                    return f"{tensor.path}: '{name}' is FP8 and has no scale '{name}{SCALE}'"
                if scale.shape != scale_grid(shape, self.block_size):
                    return f"{scale.path}: '{scale.name}' has shape {scale.shape}, which does not fit '{name}'"
            elif self._is_bytes(name):
                return self._scale_problem(name, shape)
            elif not tensor.dtype.is_floating_point or tensor.dtype_name.startswith("F8"):
                return f"{tensor.path}: '{name}' is {tensor.dtype_name}, which nothing here reads as a weight"
            return None
        packed = self.stored[f"{name}_packed"]
        if (problem := self._scale_problem(name, shape)) is not None:
            return problem
        bits = packed.shape[1] * 32 / shape[1]
        if not bits.is_integer() or not 1 <= bits <= 8 or packed.shape[0] != shape[0]:
            return f"{packed.path}: '{packed.name}' has shape {packed.shape}, which is no packing of {shape}"
        return None

    def _is_bytes(self, name: str) -> bool:
        """Whether a weight is stored as one int8 each, with scales."""
        tensor = self.stored.get(name)
        return tensor is not None and tensor.dtype_name == "I8" and f"{name}_scale" in self.stored

    def _scale_problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        stored = self.stored.get(name) or self.stored[f"{name}_packed"]
        if f"{name}_scale" not in self.stored:
            return f"{stored.path}: '{stored.name}' has no '{name}_scale'"
        if f"{name}_zero_point" in self.stored or f"{name}_g_idx" in self.stored:
            return f"{stored.path}: '{stored.name}' is asymmetric or in another order than its input; neither is read"
        rows, groups = (*self.stored[f"{name}_scale"].shape, 0)[:2]
        if rows != shape[0] or groups < 1 or shape[1] % (groups * GROUP):
            return (
                f"{stored.path}: '{stored.name}' of shape {shape} has scales {(rows, groups)}, no groups of {GROUP}s"
            )
        return None

    def bits(self, name: str) -> int | None:
        """Bits of one weight where it is stored in whole numbers; None for floats and FP8."""
        if self._is_bytes(name):
            return 8
        packed = self.stored.get(f"{name}_packed")
        return (
            None
            if packed is None
            else packed.shape[1] * 32 // (self.stored[f"{name}_scale"].shape[1] * self._group(name))
        )

    def _group(self, name: str) -> int:
        """Weights that share a scale."""
        return self.shape(name)[1] // self.stored[f"{name}_scale"].shape[1]

    def _rows(self, tensor: StoredTensor, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, read alone."""
        count = rows.stop - rows.start
        row = tensor.nbytes // max(1, tensor.shape[0])
        shape = (count, *tensor.shape[1:])
        return replace(tensor, offset=tensor.offset + rows.start * row, shape=shape, nbytes=count * row).read()

    def chunks(self, name: str) -> Iterator[slice]:
        """The rows of a weight, as many at a time as are converted at once."""
        shape = self.shape(name)
        step = max(1, _CHUNK // math.prod(shape[1:]))
        if self.block_size is not None:
            step = -(-step // self.block_size[0]) * self.block_size[0]
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def floats(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a weight (from one of `chunks`), in the dtype on disk or, where that is quantised, in fp32."""
        tensor = self.stored.get(name)
        if tensor is None or self._is_bytes(name):
            whole, scale = self.codes(name, rows)
            groups = whole.unflatten(-1, (-1, GROUP))
            return (groups * scale.float().unsqueeze(-1)).flatten(-2)
        values = self._rows(tensor, rows)
        if tensor.dtype_name != "F8_E4M3":
            return values
        assert self.block_size is not None
        high = self.block_size[0]
        scale = self._rows(self.stored[name + SCALE], slice(rows.start // high, -(-rows.stop // high)))
        return dequantize_blocks(values, scale, self.block_size, torch.empty(values.shape))

    def codes(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole numbers int8 `(N, K)` and scales `(N, K / 32)` of rows of a weight that is stored so.

        Larger groups than 32 repeat their scale.
        """
        bits, group = self.bits(name), self._group(name)
        assert bits is not None
        scale = self._rows(self.stored[f"{name}_scale"], rows)
        if self._is_bytes(name):
            whole = self._rows(self.stored[name], rows)
        else:
            whole = unpack(self._rows(self.stored[f"{name}_packed"], rows), bits)
        return whole, scale.repeat_interleave(group // GROUP, dim=-1)
