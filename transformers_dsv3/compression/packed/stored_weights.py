"""Weights of other programs' quantised checkpoints as whole numbers and scales, by what the files' headers say.

Shape suffixes: N rows (outputs), K columns (inputs), G groups of columns that share a scale.

| format | tensors of a weight |
|---|---|
| compressed-tensors `pack-quantized` | `weight_packed`, `weight_scale` `(N, G)`; `weight_zero_point`, `weight_g_idx` |
| compressed-tensors `int-quantized` | `weight` int8 and the same |
| GPTQ | `qweight`, `scales` `(G, N)`, `qzeros`, `g_idx`, packed along K |
| AWQ | `qweight`, `scales` `(G, N)`, `qzeros`, packed along N in an order of its own |

A weight is (q - zero point) * scale.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...kernels.cpu.operators import GROUP
from ...models.dsv3.checkpoint_files_dsv3 import StoredTensor
from .format import unpack


def rows_of(tensor: StoredTensor, rows: slice) -> StoredTensor:
    """Some rows of a tensor of a file, to be read alone."""
    row = tensor.nbytes // max(1, tensor.shape[0])
    count = rows.stop - rows.start
    shape = (count, *tensor.shape[1:])
    return replace(tensor, offset=tensor.offset + rows.start * row, shape=shape, nbytes=count * row)


@dataclass
class StoredWeight(ABC):
    """One quantised weight `(N, K)` of a checkpoint, not read yet.

    Args:
        name: of the module that it belongs to.
        parts: its tensors, by what follows the module's name.
        bits: of one weight on disk. group: columns that share a scale, None for a row or all of the matrix.
    """

    name: str
    parts: dict[str, StoredTensor]
    bits: int
    group: int | None
    scale: ClassVar[str] = "scales"
    zero: ClassVar[str] = "qzeros"
    order: ClassVar[str] = "g_idx"

    @property
    def main(self) -> StoredTensor:
        """The stored whole numbers."""
        return self.parts["qweight"]

    @abstractmethod
    def shape(self, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        """`(N, K)`; where padding hides K, what the model expects if that fits."""

    @abstractmethod
    def read_stored(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`(N, K)` int8, the whole numbers less half their range."""

    @abstractmethod
    def read_all_zeros(self) -> torch.Tensor:
        """`(N, G)`, or of one row or column, the zero points less half the range."""

    def shapes(self, shape: tuple[int, ...]) -> dict[str, list[tuple[int, ...]]]:
        """Those that the other tensors of a weight may have."""
        rows, columns = shape
        groups = self._groups(columns)
        return {
            self.scale: [(groups, rows)],
            self.zero: [(groups, rows * self.bits // 32)],
            self.order: [(columns,)],
        }

    def _groups(self, columns: int) -> int:
        return 1 if self.group is None else -(-columns // self.group)

    def shape_problems(self, shape: tuple[int, ...]) -> list[str]:
        """Which of its tensors do not go with a weight of a shape, in a sentence each."""
        groups = "" if self.group is None else f" in groups of {self.group}"
        return [
            f"{tensor.path}: '{tensor.name}' has shape {tensor.shape}; '{self.main.name}', a weight of shape {shape}"
            f"{groups}, needs {shapes[0]}"
            for part, shapes in self.shapes(shape).items()
            if (tensor := self.parts.get(part)) is not None and tensor.shape not in shapes
        ]

    def read_scale(self) -> torch.Tensor:
        """`(N, G)`, or of one row or column, in the dtype on disk."""
        return self.parts[self.scale].read().T.contiguous()

    def read_zeros(self) -> torch.Tensor | None:
        """As `read_all_zeros`; None where they are all half the range, so that nothing is to be taken off."""
        if self.zero not in self.parts:
            return None
        zeros = self.read_all_zeros()
        return zeros if bool(zeros.any()) else None

    def read_order(self) -> torch.Tensor | None:
        """`(K,)` the group of each column, or None where columns are in order."""
        order = self.parts.get(self.order)
        if order is None or self.group is None:
            return None
        groups = order.read().long()
        return None if torch.equal(groups, torch.arange(len(groups)) // self.group) else groups

    def _by_column(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """`(N, G)` to what multiplies `(N, K)`."""
        if self.group is None or values.shape[1] == 1:
            return values
        order = self.read_order()
        return values.repeat_interleave(self.group, dim=1)[:, :columns] if order is None else values[:, order]

    def read_whole(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`(N, K)` whole numbers less their zero points: int8, or int16 where there are such."""
        whole, zeros = self.read_stored(shape), self.read_zeros()
        return whole if zeros is None else whole.short() - self._by_column(zeros, shape[1]).short()

    def dequantized(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`(N, K)` fp32."""
        return self.read_whole(shape) * self._by_column(self.read_scale().float(), shape[1])

    @cached_property
    def held_bits(self) -> int:
        """Bits that hold every value less its zero point."""
        return self.bits + (self.read_zeros() is not None)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why groups of 32 with scales in fp16 do not hold this weight exactly, or None. Reads its scales."""
        if shape[1] % GROUP:
            return f"inputs that are no multiple of {GROUP}"
        if self.group is not None and self.group % GROUP:
            return f"groups of {self.group}"
        if self.held_bits > 8:
            return "zero points of 8 bits"
        if self.read_order() is not None:
            return "columns in another order (g_idx)"
        scale = self.read_scale()
        exact = scale.dtype == torch.float16 or torch.equal(scale.half().to(scale.dtype), scale)
        return None if exact and bool(scale.isfinite().all()) else "scales that fp16 does not hold"

    def grouped_scale(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`(N, K / 32)` in the dtype on disk, scales of wider groups repeated."""
        rows, columns = shape
        scale = self.read_scale()
        wider = (self.group or columns) // GROUP
        return scale.repeat_interleave(wider, dim=1)[:, : columns // GROUP].expand(rows, -1)


class CompressedWeight(StoredWeight):
    """Of compressed-tensors, packed along K, or one byte each."""

    scale, zero, order = "weight_scale", "weight_zero_point", "weight_g_idx"

    @property
    def _main(self) -> str:
        return "weight_packed" if "weight_packed" in self.parts else "weight"

    @property
    def main(self) -> StoredTensor:
        return self.parts[self._main]

    def shape(self, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        if "weight_packed" not in self.parts:
            return self.main.shape
        rows, words = self.main.shape
        if expected is not None and expected[0] == rows and -(-expected[1] * self.bits // 32) == words:
            return expected
        return rows, words * 32 // self.bits

    def shapes(self, shape: tuple[int, ...]) -> dict[str, list[tuple[int, ...]]]:
        rows, columns = shape
        groups = self._groups(columns)
        scales: list[tuple[int, ...]] = [(rows, groups)]
        if self.group is None:
            scales += [(rows,), (1,), (), (1, 1)]
        zeros = self.parts.get(self.zero)
        is_packed = zeros is not None and zeros.dtype == torch.int32
        return {
            self.scale: scales,
            self.zero: [(-(-rows * self.bits // 32), groups)] if is_packed else scales,
            self.order: [(columns,)],
        }

    def of_rows(self, rows: slice) -> CompressedWeight:
        """The weight that is some rows of this one, read alone; of one without zero points."""
        by_row = {part: rows_of(self.parts[part], rows) for part in (self._main, self.scale) if self._is_by_row(part)}
        return replace(self, parts=self.parts | by_row)

    def _is_by_row(self, part: str) -> bool:
        """Whether a tensor has a row for each row of the weight, not one for all."""
        return self.parts[part].shape[:1] == self.main.shape[:1]

    def read_stored(self, shape: tuple[int, ...]) -> torch.Tensor:
        return _unpack_rows(self.main.read(), self.bits, shape[1])

    def read_all_zeros(self) -> torch.Tensor:
        zeros = self.parts[self.zero].read()
        if zeros.dtype != torch.int32:
            return _as_matrix(zeros)
        return _unpack_rows(zeros.T, self.bits, self.main.shape[0]).T

    def read_scale(self) -> torch.Tensor:
        return _as_matrix(self.parts[self.scale].read())


def _as_matrix(scale: torch.Tensor) -> torch.Tensor:
    return scale if scale.dim() == 2 else scale.reshape(-1, 1)


def _unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 `(N, ceil(K * bits / 32))` to int8 `(N, K)`, the last words not always full; int8 stays."""
    if packed.dtype == torch.int8:
        return packed
    return unpack(F.pad(packed, (0, -packed.shape[1] % bits)), bits)[:, :columns]


class GptqWeight(StoredWeight):
    """Of GPTQ, packed along K; zero points along N, less one in the first version of the format."""

    zero_offset = 1

    def shape(self, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        words, rows = self.main.shape
        return rows, words * 32 // self.bits

    def read_stored(self, shape: tuple[int, ...]) -> torch.Tensor:
        return _unpack_rows(self.main.read().T, self.bits, shape[1])

    def read_all_zeros(self) -> torch.Tensor:
        rows = self.parts[self.scale].shape[1]
        return _unpack_rows(self.parts[self.zero].read(), self.bits, rows).T.short() + self.zero_offset


class Gptq2Weight(GptqWeight):
    """Of the second version of the format."""

    zero_offset = 0


# Where in a word AWQ puts columns 0 to 7
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class AwqWeight(StoredWeight):
    """Of AWQ: 4 bits, packed along N."""

    def shape(self, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        columns, words = self.main.shape
        return words * 8, columns

    def read_stored(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._read(self.main)

    def read_all_zeros(self) -> torch.Tensor:
        return self._read(self.parts[self.zero])

    @staticmethod
    def _read(tensor: StoredTensor) -> torch.Tensor:
        return unpack(tensor.read(), 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).T.contiguous()


# Names of the tensors of a weight, after its module's
_COMPRESSED = re.compile(r"(.+)\.(weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx|weight)$")
_AUTO = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx)$")


def stored_weights(
    stored: Mapping[str, StoredTensor], fields: Mapping[str, Any]
) -> tuple[dict[str, StoredWeight], dict[str, StoredTensor], list[str]]:
    """The quantised weights of a checkpoint, by their modules' names.

    Args:
        stored: its tensors. fields: its `quantization_config`, one that `format_refusal` takes.

    Returns:
        The weights; all other tensors; and what is wrong, one sentence each.
    """
    is_compressed = fields["quant_method"] == "compressed-tensors"
    pattern, main = (_COMPRESSED, ("weight_packed", "weight")) if is_compressed else (_AUTO, ("qweight",))
    modules: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = pattern.match(name)
        if match is None or (match[2] == "weight" and tensor.dtype != torch.int8):
            others[name] = tensor
        else:
            modules.setdefault(match[1], {})[match[2]] = tensor
    weights: dict[str, StoredWeight] = {}
    problems = []
    for name, parts in modules.items():
        values = next((parts[part] for part in main if part in parts), None)
        if values is None:
            # Of a weight that is not quantised: what reads the checkpoint's other tensors says so
            others |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            continue
        scale = "weight_scale" if is_compressed else "scales"
        wrong = [part for part in (scale, *(() if is_compressed else ("qzeros",))) if part not in parts]
        scheme = _compressed_scheme(name, fields) if is_compressed else fields
        if wrong:
            problems.append(f"{values.path}: '{values.name}' is quantised and has no '{name}.{wrong[0]}'")
        elif scheme is None:
            problems.append(f"{values.path}: '{values.name}' is quantised, and no group of the config is for it")
        elif values.dtype not in (torch.int32, torch.int8) or len(values.shape) != 2:
            problems.append(f"{values.path}: '{values.name}' is {values.dtype_name} of shape {values.shape}")
        elif is_compressed:
            if not scheme.get("symmetric", True) and "weight_zero_point" not in parts:
                problems.append(f"{values.path}: '{values.name}' has no '{name}.weight_zero_point'")
                continue
            weights[name] = CompressedWeight(name, parts, scheme["num_bits"], _group(scheme))
        else:
            weights[name] = _auto_weight(name, parts, fields)
    return weights, others, problems


def _group(scheme: Mapping[str, Any]) -> int | None:
    size = scheme.get("group_size")
    return size if size and size > 0 and scheme.get("strategy", "group") in ("group", None) else None


def _auto_weight(name: str, parts: dict[str, StoredTensor], fields: Mapping[str, Any]) -> StoredWeight:
    group = fields.get("group_size", 128)
    group = group if group > 0 else None
    if fields["quant_method"] == "awq":
        return AwqWeight(name, parts, 4, group)
    kind = Gptq2Weight if fields.get("checkpoint_format") == "gptq_v2" else GptqWeight
    return kind(name, parts, fields["bits"], group)


def _matches(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _compressed_scheme(name: str, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the config says of a module's weights: its name goes before a pattern, a pattern before a class."""
    kind = "Embedding" if name.rpartition(".")[2] == "embed_tokens" else "Linear"
    if any(_matches(name, ignored) or ignored == kind for ignored in fields.get("ignore") or ()):
        return None
    groups = [(target, group) for group in fields["config_groups"].values() for target in group["targets"]]
    for is_for in (name.__eq__, lambda target: _matches(name, target), kind.__eq__):
        for target, group in groups:
            if is_for(target):
                found: Mapping[str, Any] = group["weights"]
                return found
    return None


def format_refusal(fields: Mapping[str, Any]) -> str | None:
    """Why this package does not read a `quantization_config`, which is left to Transformers' own reader; or None."""
    method = fields.get("quant_method")
    if method == "gptq":
        is_other = fields.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2")
        return "another format of GPTQ" if is_other or fields.get("bits") not in (2, 3, 4, 8) else None
    if method == "awq":
        is_other = str(fields.get("version", "gemm")).lower() != "gemm" or fields.get("bits", 4) != 4
        return "another format of AWQ" if is_other else None
    if method != "compressed-tensors":
        return f"the method {method!r}"
    if fields.get("quantization_status") not in (None, "compressed") or fields.get("sparsity_config"):
        return "weights that are not compressed, or sparse"
    if fields.get("transform_config"):
        return "weights that are transformed"
    groups = (fields.get("config_groups") or {}).values()
    for group in groups:
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        if (group.get("format") or fields.get("format")) not in FORMATS:
            return f"the format {group.get('format') or fields.get('format')!r}"
        if weights.get("type", "int") != "int" or not 1 <= weights.get("num_bits", 8) <= 8:
            return "weights that are no whole numbers"
        if weights.get("strategy") not in (None, "group", "channel", "tensor"):
            return f"the strategy {weights.get('strategy')!r}"
        if group.get("output_activations") or (inputs and (inputs.get("type") != "int" or not inputs.get("dynamic"))):
            return "activations that are not rounded as they come"
    return None if groups else "no groups of modules"


FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
