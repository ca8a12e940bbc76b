"""`from_pretrained(..., gguf_file=…)`: models and tokenizers of GGUF files, Q8_0 and Q4_0 kept as they are.

`Dsv3CheckpointMixin.from_pretrained` is handed it by `registration.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...kernels.pages import in_huge_pages
from ...kernels.quantized_groups import whole_numbers
from ...models.dsv3.checkpoint_dsv3 import PACKED_METHOD
from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError, listing
from ...models.dsv3.moe_dsv3 import DeepseekV3Experts
from ..disk_room import disk_room
from ..quantize import mark_quantized
from ..quantized_weights import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, empty_groups
from .config import config_of
from .file import GgufFile, GgufTensor, dequantized, read_gguf
from .format import BF16, BITS, F16, FLOATS, KEY_PART, join_kv_b, sources_of, unpack_blocks


# Of safetensors, which a loader may ask a tensor for
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_Convert = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Unread:
    """A parameter that is read when Transformers' loader takes it, straight into its place.

    `parts` are joined along their rows, each matrix of a stack by itself; `convert` makes rows of their bytes. `room`
    makes the memory for it.
    """

    parts: tuple[GgufTensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    convert: _Convert
    room: Callable[[Sequence[int], torch.dtype], torch.Tensor] | None = None

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES[self.dtype]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        """All of it, of `shape` and `dtype`."""
        if self.room is None:
            out = in_huge_pages(torch.empty(self.shape, dtype=self.dtype))
        else:
            out = self.room(self.shape, self.dtype)
        matrices = out.view(self.shape[0] if len(self.shape) == 3 else 1, -1, self.shape[-1])
        for i, matrix in enumerate(matrices):
            start = 0
            for part in self.parts:
                count = part.rows // len(matrices)
                for rows, data in part.chunks(i * count, (i + 1) * count):
                    matrix[start + rows.start : start + rows.stop] = self.convert(data, part.ggml_type)
                start += count
        return out


@dataclass(frozen=True)
class UnreadKeyValue(Unread):
    """`kv_b_proj`, of which a file has the keys transposed."""

    def read(self) -> torch.Tensor:
        keys, values = (Unread((part,), part.shape, self.dtype, self.convert).read() for part in self.parts)
        return join_kv_b(keys, values)


def _to_float(dtype: torch.dtype) -> _Convert:
    def convert(rows: torch.Tensor, ggml_type: int) -> torch.Tensor:
        if ggml_type in FLOATS:
            return rows.view(FLOATS[ggml_type]).to(dtype)
        return dequantized(rows, ggml_type).to(dtype)

    return convert


def _to_values(bits: int) -> _Convert:
    def convert(rows: torch.Tensor, ggml_type: int) -> torch.Tensor:
        values = unpack_blocks(rows, ggml_type)[0]
        return whole_numbers(values) if BITS[ggml_type] < bits else values

    return convert


def _to_scale(rows: torch.Tensor, ggml_type: int) -> torch.Tensor:
    return unpack_blocks(rows, ggml_type)[1]


class GgufWeights(dict):
    """The weights of a GGUF file, which become a state dict when the model is there. See `checkpoint_dsv3.READERS`.

    Args:
        file: its headers.
        keeps_blocks: whether Q8_0 and Q4_0 stay as they are.
        map_from_disk, activations: as `PackedWeightsConfig` has them.
    """

    def __init__(
        self,
        file: GgufFile,
        keeps_blocks: bool = True,
        map_from_disk: bool | str | None = None,
        activations: str | None = None,
    ):
        super().__init__()
        self.file, self.keeps_blocks = file, keeps_blocks
        self.map_from_disk, self.activations = map_from_disk, activations

    @property
    def dtype(self) -> torch.dtype:
        """Of a model that is loaded without `dtype`: that of the matrices, bf16 where these are quantised."""
        types = {tensor.ggml_type for tensor in self.file.tensors.values() if len(tensor.shape) > 1}
        if types - set(FLOATS) or BF16 in types:
            return torch.bfloat16
        return torch.float16 if F16 in types else torch.float32

    def config(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return config_of(self.file.metadata, self.file.tensors)

    def completed(self, config: Any) -> Any:
        """A config that Transformers made of the first file of several, with what the others tell."""
        if self.file.metadata.get("split.count", 0) > 1:
            fields = self.config()
            for name in ("tie_word_embeddings", "num_nextn_predict_layers"):
                setattr(config, name, fields[name])
        return config

    def into(self, model: Any) -> dict[str, Unread]:
        """Puts quantised layers in their places and gives what they and the others are to be filled with.

        Args:
            model: on the meta device.

        Raises:
            CheckpointError: for missing tensors, wrong shapes and types that nothing dequantises.
        """
        expected = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
        sources = {name: sources_of(name, model.config, self.file.tensors) for name in expected}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        if model.config.tie_word_embeddings:
            sources = {name: names for name, names in sources.items() if names != ["output.weight"]}
        self._check(expected, sources, tied)
        parts = {name: tuple(self.file[name] for name in names) for name, names in sources.items() if names}
        bits = {}
        if self.keeps_blocks:
            bits = self._quantise_modules(model, parts)
        unread: dict[str, Unread] = {}
        for name, tensors in parts.items():
            shape = tuple(expected[name].shape)
            if name in bits:
                values, scale = model.get_parameter(name), model.get_buffer(f"{name}_scale")
                unread[name] = Unread(tensors, tuple(values.shape), values.dtype, _to_values(bits[name]))
                unread[f"{name}_scale"] = Unread(tensors, tuple(scale.shape), scale.dtype, _to_scale)
            else:
                kind = UnreadKeyValue if tensors[0].name.endswith(KEY_PART) else Unread
                dtype = expected[name].dtype
                unread[name] = kind(tensors, shape, dtype, _to_float(dtype))
        experts = [n for n in unread if n.removesuffix("_scale") in bits and ".experts." in n]
        n_bytes = {n: math.prod(u.shape) * u.dtype.itemsize for n, u in unread.items()}
        room = disk_room(sum(n_bytes.values()), sum(n_bytes[n] for n in experts), self.map_from_disk)
        if room is not None:
            unread |= {n: replace(unread[n], room=room.empty) for n in experts}
        self._share_with_head(model, tied, unread)
        if bits:
            mark_quantized(model, self.activations)
        return unread

    def _check(self, expected: Mapping[str, torch.Tensor], sources: Mapping[str, list[str]], tied: Any) -> None:
        path, tensors = self.file.path, self.file.tensors
        missing, shapes = [], []
        for name, names in sources.items():
            absent = [f"'{source}'" for source in names if source not in tensors]
            missing += absent
            if absent or not names:
                continue
            found = tuple(tensors[source].shape for source in names)
            wanted = tuple(expected[name].shape)
            whole: tuple[int, ...]
            if len(found) == 2 and names[0].endswith(KEY_PART):
                heads, rank, keys = found[0]
                whole = (heads * (keys + found[1][1]), rank) if found[1][::2] == (heads, rank) else ()
            else:
                whole = (*found[0][:-2], sum(s[-2] for s in found), found[0][-1]) if len(found[0]) > 1 else found[0]
            if whole != wanted:
                shapes.append(f"{names} of {found} for {name} of {wanted}")
        if missing:
            raise CheckpointError(f"{path}: missing tensors {listing(missing)}; nothing was loaded")
        if shapes:
            raise CheckpointError(f"{path}: shapes that its metadata do not ask for: {listing(shapes)}")
        for kind, names in _by_type(tensors).items():
            if kind not in FLOATS and kind not in BITS:
                _refuse_unless_dequantised(tensors[names[0]])

    def _quantise_modules(self, model: Any, parts: Mapping[str, tuple[GgufTensor, ...]]) -> dict[str, int]:
        """Replaces modules whose weights stay quantised; bits by the names of these weights."""
        found: dict[str, int] = {}

        def bits_of(*names: str) -> int | None:
            kinds = {tensor.ggml_type for name in names for tensor in parts.get(name, ())}
            return max(BITS[kind] for kind in kinds) if kinds and kinds <= set(BITS) else None

        for name, module in list(model.named_modules()):
            made: nn.Module
            if isinstance(module, DeepseekV3Experts):
                names = [f"{name}.gate_up_proj", f"{name}.down_proj"]
                if (bits := bits_of(*names)) is None:
                    continue
                made = QuantizedExperts(module, bits, self.activations)
            elif isinstance(module, (nn.Linear, nn.Embedding)) and not name.endswith("kv_b_proj"):
                names = [f"{name}.weight"]
                if (bits := bits_of(*names)) is None:
                    continue
                made = _empty_layer(module, bits, self.activations)
            else:
                continue
            model.set_submodule(name, made.train(module.training))
            found |= dict.fromkeys(names, bits)
        return found

    def _share_with_head(self, model: Any, tied: Mapping[str, str], unread: dict[str, Unread]) -> None:
        """A head tied to a quantised embedding has its whole numbers, which Transformers ties, and its scales."""
        for name, source in tied.items():
            embedding = model.get_submodule(source.rpartition(".")[0])
            if not isinstance(embedding, QuantizedEmbedding) or f"{source}_scale" not in unread:
                continue
            path = name.rpartition(".")[0]
            head = model.get_submodule(path)
            made = QuantizedLinear(embedding.weight, embedding.weight_scale, head.bias, self.activations)
            model.set_submodule(path, made.train(head.training))
            unread[f"{name}_scale"] = unread[f"{source}_scale"]


def _empty_layer(
    module: nn.Linear | nn.Embedding, bits: int, activations: str | None
) -> QuantizedLinear | QuantizedEmbedding:
    values, scale = empty_groups(module.weight.shape, bits)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(values, scale, module)
    return QuantizedLinear(values, scale, module.bias, activations)


def _by_type(tensors: Mapping[str, GgufTensor]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.ggml_type, []).append(name)
    return found


def _refuse_unless_dequantised(tensor: GgufTensor) -> None:
    try:
        dequantized(torch.zeros(1, tensor.row_bytes, dtype=torch.uint8), tensor.ggml_type)
    except NotImplementedError:
        raise CheckpointError(
            f"{tensor.path}: tensor '{tensor.name}' is {tensor.type_name}, which nothing here dequantises"
        ) from None


def open_gguf(path: str, sibling: Callable[[str], str] | None, config: Any) -> GgufWeights:
    """The reader that `checkpoint_dsv3` is given.

    Args:
        path: of the file, or of the first.
        sibling: function from the name of another file of the same model to its path.
        config: None, `GgufConfig`, whose `dequantize=True` makes plain weights of all, or `PackedWeightsConfig`.

    Raises:
        CheckpointError, ValueError: see `read_gguf`; and for another `quantization_config`.
    """
    if config is not None and getattr(config, "quant_method", None) not in ("gguf", PACKED_METHOD):
        raise ValueError(
            "`quantization_config` with `gguf_file` is transformers.GgufConfig, PackedWeightsConfig, or is left out: "
            "the file says how it is quantised."
        )
    keeps_blocks = not getattr(config, "dequantize", False)
    asked = [getattr(config, name, None) for name in ("map_from_disk", "activations")]
    return GgufWeights(read_gguf(path, sibling), keeps_blocks, *asked)
