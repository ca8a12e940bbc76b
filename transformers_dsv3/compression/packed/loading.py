"""What becomes of a quantised checkpoint's tensors in a model: kept packed where its layers hold them exactly.

Layers that are to be packed are replaced on the meta device, and every tensor gets its place in the model, to be read
when its turn comes. Before that nothing is read but scales and the like, which decide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...kernels.cpu.operators import GROUP
from ...models.dsv3.checkpoint_conversion_dsv3 import READERS, mtp_renamings, official_name
from ...models.dsv3.checkpoint_dsv3 import expected_tensors
from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError, DerivedTensor, StoredTensor, listing
from ...models.dsv3.moe_dsv3 import DeepseekV3Experts
from ..disk_room import disk_room
from ..quantized_weights import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, empty_groups, held_in
from .stored_weights import StoredWeight


logger = logging.get_logger(__name__)

# Of experts one by one, in the order of their rows in the stacks
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# After the name of an expert's module: its scales on their way into the stack
SCALE_OF_GROUPS = ".scale_of_groups"


@dataclass
class Place:
    """A quantised weight and where it goes.

    Args:
        name: of its module in the model, experts one by one. official: the same in checkpoints.
        owner: the module that holds it, which is the same but for experts.
        expected: shape that the model has for it. shape: that of the stored one.
    """

    name: str
    official: str
    owner: str
    expected: tuple[int, ...]
    weight: StoredWeight
    shape: tuple[int, ...]


@dataclass
class PackedLoading:
    """A checkpoint's tensors for a model whose layers have been replaced.

    Args:
        expected: official names and shapes of what the model held before.
        headers: the checkpoint's tensors by official names, each quantised weight as one of its own shape.
        tensors: the same as they are to be read, by the model's names, experts one by one.
    """

    expected: dict[str, tuple[int, ...]]
    headers: dict[str, StoredTensor]
    tensors: dict[str, StoredTensor]


def prepare(
    model: Any,
    weights: Mapping[str, StoredWeight],
    others: Mapping[str, StoredTensor],
    activations: str | None = None,
    keep_packed: bool = True,
    map_from_disk: bool | str | None = None,
) -> PackedLoading:
    """Replaces the layers of a model that stay packed, and says what is read into where.

    Args:
        model: on the meta device.
        weights, others: of the checkpoint, as `stored_weights` finds them.
        activations: of packed layers, see `quantize`.
        keep_packed: False dequantises all.
        map_from_disk: as `PackedWeightsConfig` has it.

    Raises:
        CheckpointError: tensors of one weight do not go together; names files and tensors. Or the disk that experts
            are to be mapped from has too little room.
    """
    expected = expected_tensors(model)
    align = _aligned(model, [*weights, *others])
    weights = {align(name): weight for name, weight in weights.items()}
    places = list(_places(model, weights))
    problems = [problem for place in places for problem in place.weight.shape_problems(place.shape)]
    if problems:
        raise CheckpointError("\n  ".join(["Tensors of quantised weights do not go together:", *problems[:20]]))

    bits = _pack(model, places, activations) if keep_packed else {}
    # Whatever has no place in the model is given to Transformers too, which lists it
    headers = {f"{name}.weight": _header(weight, weight.shape(None)) for name, weight in weights.items()}
    headers |= {align(name): tensor for name, tensor in others.items()}
    renamings = mtp_renamings(model.config, model.decoder_prefix)
    tensors = {}
    for name, tensor in headers.items():
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        tensors[name] = tensor
    for place in places:
        weight, shape = place.weight, place.shape
        as_one = headers[f"{place.official}.weight"] = _header(weight, shape)
        if place.owner not in bits:
            tensors[f"{place.name}.weight"] = _derived(as_one, "F32", shape, partial(weight.dequantized, shape))
            continue
        held = bits[place.owner]
        tensors[f"{place.name}.weight"] = _derived(
            as_one,
            "I8" if held == 8 else "U8",
            (shape[0], shape[1] * held // 8),
            partial(_held, weight, shape, held),
        )
        suffix = ".weight_scale" if place.name == place.owner else SCALE_OF_GROUPS
        tensors[place.name + suffix] = _derived(
            as_one, "F16", (shape[0], shape[1] // GROUP), partial(weight.grouped_scale, shape)
        )
    packed = [t for name, t in tensors.items() if isinstance(t, DerivedTensor) and _is_packed_expert(name, t)]
    sizes = (sum(t.nbytes for t in tensors.values()), sum(t.nbytes for t in packed))
    if (room := disk_room(*sizes, map_from_disk)) is not None:
        for tensor in packed:
            tensor.room = room.empty
    for name, tensor in tensors.items():
        tensor.deferred = ".experts." in name
    return PackedLoading(expected, headers, tensors)


def _is_packed_expert(name: str, tensor: StoredTensor) -> bool:
    return ".experts." in name and tensor.dtype_name in ("I8", "U8", "F16")


def _aligned(model: Any, names: list[str]) -> Callable[[str], str]:
    """From a checkpoint's names to the model's: one may be a decoder alone."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        return lambda name: name.removeprefix(prefix)
    if not any(name.startswith(prefix) for name in names):
        return lambda name: prefix + name
    return lambda name: name


def _header(weight: StoredWeight, shape: tuple[int, ...]) -> StoredTensor:
    """What a header would say of a weight that it holds in parts."""
    return replace(weight.main, shape=shape, dtype_name="F32")


def _derived(
    header: StoredTensor, dtype_name: str, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]
) -> DerivedTensor:
    nbytes = shape[0] * shape[1] * (4 if dtype_name == "F32" else 2 if dtype_name == "F16" else 1)
    return DerivedTensor(header.name, header.path, dtype_name, shape, header.offset, nbytes, compute=compute)


def _held(weight: StoredWeight, shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return held_in(weight.read_whole(shape).to(torch.int8), bits)


def _places(model: Any, weights: Mapping[str, StoredWeight]) -> Iterator[Place]:
    """Of the quantised weights that have one in the model, module by module."""
    for owner, module in model.named_modules():
        if isinstance(module, DeepseekV3Experts):
            shapes = {leaf: getattr(module, stack).shape[1:] for stack, leaves in PARTS.items() for leaf in leaves}
            names = [
                (f"{owner}.{e}.{leaf}", (rows // (2 if leaf != "down_proj" else 1), columns))
                for e in range(module.num_experts)
                for leaf, (rows, columns) in shapes.items()
            ]
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            names = [(owner, tuple(module.weight.shape))]
        else:
            continue
        for name, expected in names:
            official = official_name(name, model.config)
            if (weight := weights.get(official)) is not None:
                yield Place(name, official, owner, expected, weight, weight.shape(expected))


def _pack(model: Any, places: list[Place], activations: str | None) -> dict[str, int]:
    """Replaces what stays packed.

    Returns:
        Names of the modules and the bits that they hold a weight in.
    """
    with ThreadPoolExecutor(READERS) as pool:
        reasons = list(pool.map(_refusal, places))
    by_owner: dict[str, list[Place]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    for place, reason in zip(places, reasons):
        by_owner[place.owner].append(place)
        if reason is not None and place.owner not in refused[reason]:
            refused[reason].append(place.owner)
    left = {owner for owners in refused.values() for owner in owners}
    found = {}
    for owner, held in by_owner.items():
        module = model.get_submodule(owner)
        if isinstance(module, DeepseekV3Experts) and len(held) < 3 * module.num_experts:
            refused["experts that are quantised in part"].append(owner)
        elif owner in left or not _can_be_packed(owner, module):
            continue
        else:
            stored_bits = max(place.weight.held_bits for place in held)
            packed = _packed(module, stored_bits, activations)
            model.set_submodule(owner, packed)
            found[owner] = packed.bits
    _pack_tied_head(model, activations)
    for reason, owners in refused.items():
        if reason and owners:
            logger.warning(f"Dequantised, since they have {reason}: {listing(owners)}")
    return found


def _refusal(place: Place) -> str | None:
    # Of another shape than the model's: the comparison of headers says so, or Transformers makes it anew
    return place.weight.refusal(place.shape) if place.shape == place.expected else ""


def _can_be_packed(name: str, module: nn.Module) -> bool:
    """Not `kv_b_proj`, which is multiplied in parts, nor routers."""
    is_linear = type(module) is nn.Linear and not name.endswith("kv_b_proj")
    return is_linear or isinstance(module, (nn.Embedding, DeepseekV3Experts))


def _packed(
    module: nn.Module, stored_bits: int, activations: str | None
) -> QuantizedExperts | QuantizedEmbedding | QuantizedLinear:
    bits = 4 if stored_bits <= 4 else 8
    made: QuantizedExperts | QuantizedEmbedding | QuantizedLinear
    if isinstance(module, DeepseekV3Experts):
        made = QuantizedExperts(module, bits, activations)
    else:
        values, scale = empty_groups(module.weight.shape, bits)  # type: ignore[union-attr,arg-type]
        if isinstance(module, nn.Embedding):
            made = QuantizedEmbedding(values, scale, module)
        else:
            made = QuantizedLinear(values, scale, module.bias, activations)  # type: ignore[arg-type]
    made.stored_bits = stored_bits
    return made.train(module.training)


def _pack_tied_head(model: Any, activations: str | None) -> None:
    """A head that has the embedding's weights: it gets them when they are there, see `share_scales`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding) and head is not None and model.config.tie_word_embeddings:
        made = QuantizedLinear(embedding.weight, embedding.weight_scale, None, activations)
        made.weight_scale = None  # type: ignore[assignment]
        made.stored_bits = embedding.stored_bits
        model.set_output_embeddings(made.train(head.training))


def share_scales(model: Any) -> None:
    """Gives a tied head the embedding's scales; Transformers has given it the weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear) and head.weight_scale is None:
        head.weight, head.weight_scale = embedding.weight, embedding.weight_scale
