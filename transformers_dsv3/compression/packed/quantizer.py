"""Checkpoints of quantised weights that stay packed, as a quantization method of Transformers.

Reads compressed-tensors' `pack-quantized` and `int-quantized` formats, GPTQ and AWQ, each expert by its official name;
writes `pack-quantized`. Weights become layers of 8 or 4 bits in groups of 32 (`quantized_weights`) where these hold
them exactly, and are dequantised to the asked dtype elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...models.dsv3.checkpoint_conversion_dsv3 import JoinGateUp, MergeExperts
from ...models.dsv3.checkpoint_dsv3 import PACKED_METHOD, renamed_table
from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError, read_checkpoint
from ..quantized_weights import ROUNDED_DTYPES
from .loading import SCALE_OF_GROUPS, PackedLoading, prepare, share_scales
from .saving import QUANTIZED, packed_model_config, packed_state_dict
from .stored_weights import format_refusal, stored_weights


class PackedWeightsConfig(QuantizationConfigMixin):
    """How `from_pretrained` reads a quantised checkpoint: `quantization_config=PackedWeightsConfig(...)`.

    Args:
        activations: None, "8" or "16", as `quantize` takes it. Where it is None and the checkpoint's own config rounds
            activations to 8 bits, "8".
        dequantize: whether to load all weights in the asked dtype, as a model that is not quantised.
        map_from_disk: whether routed experts are mapped from files in place of memory: as long as the model lives they
            take as much room in `TMPDIR` or `/var/tmp`, or in the folder that is given here, and decoding reads from
            there what memory does not keep. None, the default: where memory is too short for the model.
        checkpoint: the checkpoint's own `quantization_config`, and `key_mapping`, set by `from_pretrained`.
        kwargs: `quant_method`, which Transformers gives to every such config.

    Raises:
        ValueError: for other activations.
    """

    def __init__(
        self,
        activations: str | None = None,
        dequantize: bool = False,
        map_from_disk: bool | str | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        if activations not in ROUNDED_DTYPES:
            raise ValueError(f"activations is '8', '16' or None, not {activations!r}.")
        self.quant_method = PACKED_METHOD
        self.activations, self.dequantize = activations, dequantize
        self.map_from_disk = os.fspath(map_from_disk) if isinstance(map_from_disk, os.PathLike) else map_from_disk
        self.checkpoint, self.key_mapping = dict(checkpoint or {}), dict(key_mapping or {})

    @classmethod
    def reading(cls, fields: Mapping[str, Any], requested: Any, key_mapping: Any) -> dict[str, Any] | None:
        """What Transformers is to find in the config in place of the checkpoint's `quantization_config`, or None.

        Args:
            fields: that config.
            requested: the argument `quantization_config` of `from_pretrained`: one of this class, none, or one of
                Transformers' own that dequantises. Whatever else is asked for is not served here.
        """
        method = getattr(requested, "quant_method", None)
        dequantize = bool(getattr(requested, "dequantize", False))
        is_served = requested is None or isinstance(requested, cls) or (method == "compressed-tensors" and dequantize)
        if not is_served:
            return None
        if reason := format_refusal(fields):
            if isinstance(requested, cls):
                raise ValueError(
                    f"PackedWeightsConfig does not read {reason} of the checkpoint's quantization_config."
                )
            return None
        activations = getattr(requested, "activations", None)
        groups = (fields.get("config_groups") or {}).values()
        if activations is None and any(group.get("input_activations") for group in groups):
            activations = "8"
        return {
            "quant_method": PACKED_METHOD,
            "activations": activations,
            "dequantize": dequantize,
            "map_from_disk": getattr(requested, "map_from_disk", None),
            "checkpoint": dict(fields),
            "key_mapping": dict(key_mapping or {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`: the checkpoint's, as every reader of compressed-tensors knows it."""
        return dict(self.checkpoint)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedWeightsQuantizer(HfQuantizer):
    """Reads and writes checkpoints whose weights stay packed."""

    requires_calibration = True
    quantization_config: PackedWeightsConfig
    loading: PackedLoading | None = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        files = list(checkpoint_files or [])
        if not files or not all(file.endswith(".safetensors") for file in files):
            raise CheckpointError("Quantised weights are read from safetensors files alone")
        stored = renamed_table(read_checkpoint(files), [WeightRenaming(*pair) for pair in config.key_mapping.items()])
        weights, others, problems = stored_weights(stored, config.checkpoint)
        if problems:
            raise CheckpointError(
                "\n  ".join(["The checkpoint's quantised weights cannot be read; nothing was loaded.", *problems[:20]])
            )
        self.loading = prepare(model, weights, others, config.activations, not config.dequantize, config.map_from_disk)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Scales of packed experts are stacked as their values are."""
        experts = "mlp.experts"
        return [
            *weight_conversions,
            WeightConverter(
                source_patterns=[f"{experts}.*.{part}{SCALE_OF_GROUPS}" for part in ("gate_proj", "up_proj")],
                target_patterns=f"{experts}.gate_up_proj_scale",
                operations=[MergeExperts(dim=0), JoinGateUp(dim=1)],
            ),
            WeightConverter(
                source_patterns=f"{experts}.*.down_proj{SCALE_OF_GROUPS}",
                target_patterns=f"{experts}.down_proj_scale",
                operations=[MergeExperts(dim=0)],
            ),
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.loading = None
        # Saving reverts the conversions that are registered, see `DeepseekFp8Quantizer`
        model._weight_conversions = None
        if self.quantization_config.dequantize:
            return model
        if any(isinstance(module, QUANTIZED) for module in model.modules()):
            share_scales(model)
            self.describe(model)
        else:  # layers hold nothing of what was read: a plain model, which is saved as one
            self.remove_quantization_config(model)
        return model

    def describe(self, model: Any) -> None:
        """Has the model's config say what a checkpoint of the model, as it is now, will hold."""
        model.config.quantization_config = self.quantization_config
        self.quantization_config.checkpoint = packed_model_config(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        self.describe(model)
        return packed_state_dict(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters; without any, `Trainer` refuses quantised models


def register_packed() -> None:
    """Add it to Transformers' quantization methods, under its own name. Repeating it does nothing."""
    if PACKED_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(PACKED_METHOD)(PackedWeightsConfig)
    if PACKED_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(PACKED_METHOD)(PackedWeightsQuantizer)
