"""Weights of a checkpoint on disk, whole or some rows at a time: floats, DeepSeek's FP8, compressed-tensors' codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..kernels.cpu.operators import GROUP
from ..models.dsv3.checkpoint_checks_dsv3 import SCALE, scale_grid
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor
from .packed.format import METHOD
from .packed.stored_weights import CompressedWeight, format_refusal, rows_of, stored_weights
from .quantizer_fp8 import dequantize_blocks


# Weights converted at once; rows in multiples that end at words of packed zero points and at FP8's blocks
_CHUNK, _ROWS = 16 << 20, 32


class CheckpointWeights:
    """Reads the weights of a checkpoint by their official names, whatever they are stored as, when they are asked for.

    Args:
        stored: the checkpoint's tensors, not read yet.
        quantization: `quantization_config` of its config; None where it has none.

    Attributes:
        tensors: those that are stored as they are, or in FP8 with their scales. files: paths.
        block_size: rows and columns of FP8's blocks; None where there are none.

    Raises:
        CheckpointError: for a quantization that is not read here, and for weights that are stored in part.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None):
        fields = dict(quantization or {})
        method = fields.get("quant_method")
        block = fields.get("weight_block_size")
        self.block_size: tuple[int, int] | None = (int(block[0]), int(block[1])) if method == "fp8" and block else None
        self.tensors = dict(stored)
        self._quantized: dict[str, CompressedWeight] = {}
        self.files = sorted({tensor.path for tensor in stored.values()})
        if method is None or self.block_size:
            return
        if method != METHOD or format_refusal(fields) is not None:
            kind = f"{method}, {fields['format']}" if fields.get("format") else method
            raise CheckpointError(
                f"its quantization_config is {kind}; read here are DeepSeek's FP8 blocks and {METHOD}' whole numbers"
            )
        weights, self.tensors, problems = stored_weights(stored, fields)
        if problems:
            raise CheckpointError("\n  ".join(["its quantised weights cannot be read:", *problems[:20]]))
        for name, weight in weights.items():
            assert isinstance(weight, CompressedWeight)
            self._quantized[f"{name}.weight"] = weight

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, not of what is stored of it."""
        if (weight := self._quantized.get(name)) is None:
            return self.tensors[name].shape
        told = weight.parts.get("weight_shape")
        return weight.shape(None if told is None else tuple(told.read().tolist()))

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with what is stored of a weight of that shape, from headers; None where nothing is."""
        if (weight := self._quantized.get(name)) is not None:
            return self._problem_of_codes(weight, shape)
        if (tensor := self.tensors.get(name)) is None:
            return f"'{name}' is missing"
        if tensor.shape != shape:
            return f"{tensor.path}: '{name}' has shape {tensor.shape}, the config asks for {shape}"
        if tensor.dtype_name == "F8_E4M3":
            scale = self.tensors.get(name + SCALE)
            if self.block_size is None or scale is None:
                return f"{tensor.path}: '{name}' is FP8 and has no scale '{name}{SCALE}'"
            if scale.shape != scale_grid(shape, self.block_size):
                return f"{scale.path}: '{scale.name}' has shape {scale.shape}, which does not fit '{name}'"
        elif not tensor.dtype.is_floating_point or tensor.dtype_name.startswith("F8"):
            return f"{tensor.path}: '{name}' is {tensor.dtype_name}, which nothing here reads as a weight"
        return None

    def _problem_of_codes(self, weight: CompressedWeight, shape: tuple[int, ...]) -> str | None:
        main = weight.main
        if weight.shape(shape) != shape:
            return f"{main.path}: '{main.name}' has shape {main.shape}, which is no packing of {shape}"
        if weight.zero in weight.parts or weight.order in weight.parts:
            return f"{main.path}: '{main.name}' is asymmetric or in another order than its input; neither is read"
        if problems := weight.shape_problems(shape):
            return problems[0]
        if shape[1] % GROUP or (weight.group or GROUP) % GROUP:
            return f"{main.path}: '{main.name}' of shape {shape} is in groups of {weight.group}, not of {GROUP}s"
        return None

    def bits(self, name: str) -> int | None:
        """Bits of one weight where it is stored in whole numbers; None for floats and FP8."""
        weight = self._quantized.get(name)
        return None if weight is None else weight.bits

    def chunks(self, name: str) -> Iterator[slice]:
        """The rows of a weight, as many at a time as are converted at once."""
        shape = self.shape(name)
        multiple = math.lcm(_ROWS, self.block_size[0] if self.block_size else 1)
        step = -(-max(1, _CHUNK // math.prod(shape[1:])) // multiple) * multiple
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A weight, or rows of it, in the dtype on disk.

        Args:
            name: of the weight.
            rows: one of `chunks`; all unless given.
            dtype: of what is quantised, in place of that on disk.
        """
        if name in self._quantized:
            whole, scale = self.codes(name, rows)
            return (whole.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)
        tensor = self.tensors[name]
        scale_tensor = self.tensors.get(name + SCALE)
        values = (tensor if rows is None else rows_of(tensor, rows)).read()
        if scale_tensor is None or self.block_size is None:
            return values
        if rows is not None:
            high = self.block_size[0]
            scale_tensor = rows_of(scale_tensor, slice(rows.start // high, -(-rows.stop // high)))
        return dequantize_blocks(values, scale_tensor.read(), self.block_size, torch.empty(values.shape, dtype=dtype))

    def codes(self, name: str, rows: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole numbers int8 `(N, K)` and scales `(N, K / 32)`, in their dtype on disk, of rows of a weight that is
        stored so.

        Larger groups than 32 repeat their scale.
        """
        weight, shape = self._quantized[name], self.shape(name)
        if rows is not None:
            weight, shape = weight.of_rows(rows), (rows.stop - rows.start, *shape[1:])
        return weight.read_stored(shape), weight.grouped_scale(shape)
