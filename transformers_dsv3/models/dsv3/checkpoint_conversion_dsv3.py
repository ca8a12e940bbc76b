"""Official per-expert tensor names to fused expert parameters, and back, without copies of a whole layer.

Shape suffixes: E experts, I intermediate size, H hidden size. On disk `experts.{e}.gate_proj.weight` and
`up_proj.weight` are (I, H) and `down_proj.weight` is (H, I); in the model `experts.gate_up_proj` is (E, 2I, H), gate
rows first, and `experts.down_proj` is (E, H, I).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.utils import logging

from ...kernels.pages import in_huge_pages
from .checkpoint_files_dsv3 import StoredTensor
from .configuration_dsv3 import text_config


logger = logging.get_logger(__name__)

# Norms of MTP layers by their names in the model and in checkpoints
MTP_NORMS = {"embed_layernorm": "enorm", "hidden_layernorm": "hnorm"}


# Threads that read experts into their places. Reading is copying, and one core does not copy as fast as memory is.
READERS = min(8, os.cpu_count() or 1)


class MergeExperts(MergeModulelist):
    """Per-expert tensors to one fused tensor.

    Unread tensors (`StoredTensor`, as `Dsv3CheckpointMixin` hands them out) are read straight into the fused
    parameter, gate and up into the same one, so that loading needs the model and a little more. Everything else
    (sharded loading, PEFT adapters) takes the inherited path: a stack for each source pattern.

    It stays a `MergeModulelist` because Transformers and PEFT look for that type.
    """

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        if "trl" in sys.modules and type(model).__module__.startswith("transformers.models.deepseek_v3"):
            logger.warning_once(
                f"Transformers' own {type(model).__name__} is loaded, not the plugin's: TRL looks the class up by "
                "its name when it is given a path. Give it the model (`AutoModelForCausalLM.from_pretrained`), call "
                "`transformers_dsv3.register(names=True)` before, or run the script by `transformers-dsv3 run`."
            )
        if not all(isinstance(tensor, StoredTensor) for tensors in input_dict.values() for tensor in tensors):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        assert model is not None and full_layer_name is not None
        # In the order of the mapping: gate rows come before up rows. Tensors were collected in expert order.
        parts = [pattern for pattern in source_patterns if pattern in input_dict and self.is_weight(pattern)]
        columns: list[list[StoredTensor]] = [input_dict[pattern] for pattern in parts]
        scales = {
            tensor.key: tensor
            for pattern in input_dict
            if not self.is_weight(pattern)
            for tensor in input_dict[pattern]
        }
        first = columns[0][0]
        rows = sum(column[0].shape[0] for column in columns)
        shape = (len(columns[0]), rows, *first.shape[1:])
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        room = getattr(first, "room", None)
        if room is None:
            fused = in_huge_pages(torch.empty(shape, dtype=dtype, device=first.device or "cpu"))
        else:
            fused = room(shape, dtype)
        parts_of_fused = []
        for e, row_of_experts in enumerate(zip(*columns, strict=True)):
            start = 0
            for stored in row_of_experts:
                part = fused[e, start : start + stored.shape[0]]
                parts_of_fused.append((part, stored, scales.get(f"{stored.key}_scale_inv")))
                start += stored.shape[0]
        if (
            fused.device.type != "cpu"
            or scales
            or any(part.dtype != stored.dtype for part, stored, _ in parts_of_fused)
        ):
            # Each needs memory of its own on its way, and is converted by all cores
            for part, stored, scale in parts_of_fused:
                self.fill(part, stored, scale)
        else:
            is_inference = torch.is_inference_mode_enabled()  # of a thread

            def fill(arguments: tuple) -> None:
                with torch.inference_mode(is_inference), torch.no_grad():
                    self.fill(*arguments)

            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(fill, parts_of_fused))  # which raises what went wrong
        return {parts[0] if len(parts) > 1 else target_patterns[0]: fused}

    @staticmethod
    def is_weight(pattern: str) -> bool:
        """Whether a source pattern collects weights rather than their scales."""
        return not pattern.endswith("_scale_inv")

    def fill(self, out: torch.Tensor, stored: StoredTensor, scale: StoredTensor | None) -> None:
        """Read one expert's matrix into `out`, a contiguous slice of the fused parameter. `scale` is not used."""
        if out.device.type == "cpu" and out.dtype == stored.dtype:
            stored.read_into(out)
        else:
            out.copy_(stored.read())


class JoinGateUp(Concatenate):
    """Gate and up, merged over experts, to one (E, 2I, H): a no-op where `MergeExperts` has joined them already."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        merged = next(iter(input_dict.values()))
        if len(input_dict) == 1 and isinstance(merged, torch.Tensor):
            return {self.get_target_pattern(target_patterns): merged}
        return super().convert(input_dict, source_patterns, target_patterns, **kwargs)

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitGateUp(self.dim)


# Bytes that one file of a checkpoint is to have at most, while it is being saved
_file_size: ContextVar[int | None] = ContextVar("file_size", default=None)


@contextlib.contextmanager
def own_storage_above(max_shard_size: int | str | None) -> Iterator[None]:
    """While a model is saved: stacks larger than a file is to be are split into tensors of their own.

    Tensors that share storage go to the same file.
    """
    token = _file_size.set(None if max_shard_size is None else convert_file_size_to_int(max_shard_size))
    try:
        yield
    finally:
        _file_size.reset(token)


class SplitGateUp(Chunk):
    """(E, 2I, H) to gate and up as views: each expert's half is contiguous, so saving needs no second copy."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        halves = torch.chunk(tensor, len(target_patterns), dim=self.dim)
        limit = _file_size.get()
        if limit is not None and tensor.nbytes > limit:
            halves = tuple(half.contiguous() for half in halves)
        return dict(zip(target_patterns, halves, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinGateUp(self.dim)


def mtp_renamings(config: Any, prefix: str = "") -> list[WeightRenaming]:
    """From the official names of MTP layers, `layers.{num_hidden_layers + depth}`, to those in the model.

    Args:
        config: the model's.
        prefix: of the decoder's tensors, where others have to be left alone; any by default.

    Returns:
        Renamings in the order in which they are applied; Transformers reverts them when it saves.
    """
    config = text_config(config)
    start = f"^{re.escape(prefix)}" if prefix else ""
    renamings = []
    for depth in range(getattr(config, "num_nextn_predict_layers", 0) or 0):
        official = rf"layers\.{config.num_hidden_layers + depth}\."
        inside = rf"mtp\.{depth}\."
        renamings.append(WeightRenaming(start + official, start + inside))
        for name, official_name in MTP_NORMS.items():
            renamings.append(WeightRenaming(rf"{start}{inside}{official_name}\.", rf"{start}{inside}{name}\."))
    return renamings


def official_name(name: str, config: Any) -> str:
    """The name in official checkpoints of a tensor of the model, but for experts, which are stacked in the model."""
    match = re.match(r"(.*\b)?mtp\.(\d+)\.(\w+)(.*)", name)
    if match is None:
        return name
    prefix, depth, part, rest = match.groups()
    layer = text_config(config).num_hidden_layers + int(depth)
    return f"{prefix or ''}layers.{layer}.{MTP_NORMS.get(part, part)}{rest}"


def deepseek_v3_conversion_mapping() -> list[WeightConverter]:
    """The conversion to register for model type `deepseek_v3`: native's names, read without whole-layer copies."""
    experts = "mlp.experts"
    return [
        WeightConverter(
            source_patterns=[f"{experts}.*.gate_proj.weight", f"{experts}.*.up_proj.weight"],
            target_patterns=f"{experts}.gate_up_proj",
            operations=[MergeExperts(dim=0), JoinGateUp(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{experts}.*.down_proj.weight",
            target_patterns=f"{experts}.down_proj",
            operations=[MergeExperts(dim=0)],
        ),
    ]
