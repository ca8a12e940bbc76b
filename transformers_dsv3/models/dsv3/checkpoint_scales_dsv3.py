"""Codes and scales that would be left out: what a checkpoint stores quantised and its reader does not take for that.

Transformers lists a scale that nothing reads among the unexpected tensors and goes on, and a code that nothing
dequantises becomes a weight. Both open without an error, and compute noise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .checkpoint_files_dsv3 import StoredTensor, listing


# What formats call that which belongs to a weight: `weight_scale`, `scales`, `input_scale`, `qzeros`, `SCB`,
# `gate_up_proj_scale_inv`, `weight.absmax`, `weight.quant_state.bitsandbytes__nf4`
_COMPANION = re.compile(
    r"scale|zero_?point|\bqweight|\bqzeros|\bg_idx|\bscb\b|absmax|quant_(?:map|state)|qdata|weight_(?:packed|shape|format)",
    re.IGNORECASE,
)
# Those of a quantised cache change no weight: without them the cache is not quantised
_OF_THE_CACHE = re.compile(r"(?:k|v|q|kv|kv_cache|prob)_(?:scale|zero_point)$")
_SCALE_BESIDE = re.compile(r"_(?:weight_)?scales?(?:_inv)?$")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+[.:]")


def is_plain(tensor: StoredTensor) -> bool:
    """Whether the stored numbers are values as they stand: no integers, and not FP8."""
    return tensor.dtype.is_floating_point and not tensor.dtype_name.startswith("F8")


def owners_of(names: Iterable[str]) -> set[str]:
    """The weights of those names, and the modules that hold them."""
    return {owner for name in names for owner in (name, name.rpartition(".")[0]) if owner}


def belongs_to(name: str, owners: Collection[str]) -> bool:
    """Whether a tensor is, by its name, a scale or the like of one of `owners`, or of an expert in such a stack."""
    beside = _SCALE_BESIDE.sub("", name)  # `o_proj_scale`, outside the module
    if beside != name and beside in owners:
        return True
    if (match := _EXPERT.match(name)) and match[1] in owners:
        return _is_companion(name[match.end() :])
    stem = name
    while match := re.search(r"[.:][^.:]*$", stem):  # torchao parts the names of what makes up a weight by a colon
        stem = stem[: match.start()]
        if stem in owners:
            return _is_companion(name[len(stem) + 1 :])
    return False


def _is_companion(rest: str) -> bool:
    return bool(_COMPANION.search(rest)) and not _OF_THE_CACHE.search(rest)


def sentences(codes: Iterable[StoredTensor], unread: Iterable[StoredTensor]) -> list[str]:
    """What is wrong, in a sentence for each file.

    Args:
        codes: what would be taken for values of weights.
        unread: scales and the like that would be left out.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in codes:
        what = f"{tensor.dtype_name} codes where the model has floating-point weights, which nothing here dequantises"
        found[tensor.path, what].append(f"'{tensor.name}'")
    for tensor in unread:
        found[tensor.path, "scales of quantised weights, which nothing here reads"].append(f"'{tensor.name}'")
    return [f"{path}: {what}: {listing(names)}" for (path, what), names in found.items()]


def loading_problems(
    model: Any, stored: Mapping[str, StoredTensor], weight_mapping: Iterable[Any], is_pre_quantized: bool
) -> list[str]:
    """What Transformers' loader would leave out or take for values, with any quantizer but our own.

    Args:
        model: as the quantizer has prepared it, on the meta device.
        stored: the checkpoint's tensors by their names on disk.
        weight_mapping: the loader's renamings and converters.
        is_pre_quantized: whether the checkpoint is said to be quantised; else the model is while it is loaded.
    """
    expected, steps = model.state_dict(), list(weight_mapping)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    # Operations of quantizers know theirs
    dequantising = {
        pattern
        for step in converters
        if is_pre_quantized and any(getattr(operation, "hf_quantizer", None) for operation in step.operations)
        for pattern in step.source_patterns
    }
    owners = owners_of(expected)
    placed: list[tuple[str, bool, StoredTensor]] = []
    unread = []
    for name, tensor in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:  # as the loader does
            target, pattern = name, None
        if target in expected:
            placed.append((target, pattern in dequantising, tensor))
        elif belongs_to(target, owners):
            unread.append(tensor)
    found = {target for target, _, _ in placed}
    with_scale = {
        tensor.name.rpartition(".")[0] for _, _, tensor in placed if "scale" in tensor.name.rpartition(".")[2]
    }

    codes, plain = [], []
    for target, is_dequantised, tensor in placed:
        if _is_companion(tensor.name.rpartition(".")[2]):
            continue
        scales = [name for name in (target + "_scale_inv", target + "_scale") if name in expected]
        if is_plain(tensor):
            if is_pre_quantized and scales and not is_dequantised and found.isdisjoint(scales):
                plain.append(tensor)
        elif is_dequantised or scales:
            if tensor.name.rpartition(".")[0] not in with_scale:
                codes.append(tensor)
        elif expected[target].dtype.is_floating_point and expected[target].dtype.itemsize > 1:
            codes.append(tensor)
    return [
        *sentences(codes, unread),
        *(
            f"{tensor.path}: '{tensor.name}' is {tensor.dtype_name} and has no scale, but the `quantization_config` "
            "quantises its layer: name it in `modules_to_not_convert`"
            for tensor in plain
        ),
    ]


def unquantised_modules(stored: Mapping[str, StoredTensor]) -> list[str]:
    """Last parts of the names of matrices that a quantised checkpoint holds as values, in every layer alike.

    DeepSeek's `quantization_config` does not name them, and native would look for scales of `eh_proj`.
    """
    matrices = {
        name.removesuffix(".weight"): tensor
        for name, tensor in stored.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and not re.search(r"\.experts\.|shared_head\.head", name)
    }
    quantised = {name.rpartition(".")[2] for name, tensor in matrices.items() if not is_plain(tensor)}
    plain = set()
    for name, tensor in matrices.items():
        if is_plain(tensor):
            last = name.rpartition(".")[2]
            plain.add(name.removeprefix("model.") if last in quantised else last)
    return sorted(plain - {"embed_tokens", "gate"})
