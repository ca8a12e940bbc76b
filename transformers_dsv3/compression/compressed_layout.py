"""Which tensors of an official checkpoint are packed to how many bits, and in which file each is written.

All of it follows from the headers of the checkpoint, before a weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.cpu.operators import GROUP
from ..models.dsv3.checkpoint_checks_dsv3 import SCALE
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor, listing
from ..option_error import OptionError
from .packed.saving import EMBEDDINGS, modules_config
from .settings import WHOLE, CompressionSettings


# Names of modules. `kv_b_proj` is folded into the queries when decoding, and routers choose: both stay as they are.
EXPERTS = r"mlp\.experts\.\d+\.(gate|up|down)_proj"
LINEAR = (
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)",
    r"mlp\.(gate|up|down)_proj",
    r"mlp\.shared_experts\.(gate|up|down)_proj",
    r"eh_proj",
)
HEADS = (r"embed_tokens", r"lm_head", r"shared_head\.head")
_KINDS = {"experts": (EXPERTS,), "linear": LINEAR, "head": HEADS}
# The model's own again, which MTP layers of official checkpoints carry
_COPY = re.compile(r"layers\.\d+\.(embed_tokens|shared_head\.head)$")

# Bytes of a file beyond which another is begun
FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Layout:
    """What is written where.

    Attributes:
        bits: of each quantised weight, by name.
        files: names of the tensors in each file, in the order in which they are written, scales of FP8 weights left
            out. A file holds tensors of one step alone.
        steps: numbers of the files of each step: what stands before the layers, the layers of the main model, what
            stands behind them, the MTP layers.
        n_bytes: of all files, without headers.
        weights: parameters of the checkpoint.
    """

    bits: dict[str, int]
    files: list[list[str]]
    steps: list[list[int]]
    n_bytes: int
    weights: int

    def file_name(self, number: int) -> str:
        if len(self.files) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"


def kind_of(name: str) -> str | None:
    """What settings call a tensor, "linear", "experts" or "head"; None for those that always stay as they are."""
    module = name.removesuffix(".weight")
    for kind, patterns in _KINDS.items() if module != name else ():
        if any(re.search(rf"(^|\.){pattern}$", module) for pattern in patterns):
            return kind
    return None


def is_embedding(name: str) -> bool:
    """Whether a weight is written as `byte_tensors`, if it is quantised."""
    return name.endswith("embed_tokens.weight")


def quantization_config(planned: Layout) -> dict[str, Any]:
    """The entry of config.json that says how such a checkpoint is packed: as of a model with the same layers."""
    bits: dict[str, int] = {}
    plain: dict[str, None] = {}
    embeddings: dict[int, list[str]] = {}
    for name in (name for names in planned.files for name in names):
        kind, module, held = kind_of(name), name.removesuffix(".weight"), planned.bits.get(name)
        if is_embedding(name) or _COPY.search(module):
            if held is not None and module == "model.embed_tokens":
                embeddings[held] = [EMBEDDINGS]
            continue
        if kind == "experts":
            module = re.sub(r"\.experts\..*", ".experts", module)
        if held is not None:
            bits[module] = held
        elif kind is not None or module.endswith(".kv_b_proj"):
            plain[module] = None
    if "lm_head" not in bits:  # a tied one has no tensor
        plain["lm_head"] = None
    return modules_config(bits, list(plain), embeddings)


def layout(
    tensors: Mapping[str, StoredTensor], num_hidden_layers: int, settings: CompressionSettings, tied: bool = False
) -> Layout:
    """Plan the files of a compressed checkpoint.

    Args:
        tensors: of the checkpoint to compress, by official names.
        num_hidden_layers: of the main model.
        tied: whether embedding and head are one; they are left as they are, since nothing but this package could open
            them otherwise.

    Raises:
        OptionError: for weights whose input is not a multiple of 32 wide; names them.
    """
    names = [name for name in tensors if not name.endswith(SCALE)]
    # Checkpoints without shared experts may have them at size zero
    found: dict[str, int | None] = {}
    for name in names:
        kind = kind_of(name)
        bits = settings.of(kind) if kind and math.prod(tensors[name].shape) else WHOLE
        found[name] = None if bits == WHOLE or (tied and kind == "head") else bits
    odd = [name for name, bits in found.items() if bits is not None and tensors[name].shape[-1] % GROUP]
    if odd:
        described = [f"{name} has an input of {tensors[name].shape[-1]}" for name in odd]
        raise OptionError(
            "CHECKPOINT",
            f"{tensors[odd[0]].path}: inputs have to be multiples of {GROUP} wide; {listing(described, 3)}",
        )
    by_step: dict[float, list[str]] = {}
    for name in names:
        by_step.setdefault(_step(name, num_hidden_layers), []).append(name)
    files: list[list[str]] = []
    steps: list[list[int]] = []
    for step in sorted(by_step):
        steps.append([])
        size = math.inf
        for name in sorted(by_step[step], key=_order):
            n_bytes = _packed_bytes(tensors[name], found[name])
            if size + n_bytes > FILE_BYTES:
                steps[-1].append(len(files))
                files.append([])
                size = 0
            files[-1].append(name)
            size += n_bytes
    return Layout(
        bits={name: bits for name, bits in found.items() if bits is not None},
        files=files,
        steps=steps,
        n_bytes=sum(_packed_bytes(tensors[name], bits) for name, bits in found.items()),
        weights=sum(math.prod(tensors[name].shape) for name in names),
    )


def _step(name: str, num_hidden_layers: int) -> float:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return -1 if name.startswith("model.embed_tokens.") else num_hidden_layers - 0.5
    return int(layer[1])


def _order(name: str) -> tuple[bool, int, str]:
    """Experts last and by their numbers, as they are compressed; each written as soon as it is whole."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return (expert is not None, 0 if expert is None else int(expert[1]), name)


def _packed_bytes(tensor: StoredTensor, bits: int | None) -> int:
    values = math.prod(tensor.shape)
    if bits is None:
        return values * (2 if tensor.dtype.itemsize == 1 else tensor.dtype.itemsize)  # FP8 is written as bf16
    return (values if is_embedding(tensor.name) else values * bits // 8 + 16) + values // GROUP * 2
