"""Reader of DeepSeek's published FP8 checkpoints, as a quantization method of Transformers.

The format (`quantization_config` of DeepSeek-V3's config.json): `X.weight` is float8_e4m3fn, `X.weight_scale_inv`
holds one float32 for each block of 128×128, and the last row and column of blocks may be partial, so the scale grid is
the ceiling: 576 rows are five blocks. The weight is `X.weight * scale` of its block.

Weights are dequantised to the asked dtype on the device they are loaded to, and the model forgets that it was
quantised: it trains, saves and runs as one loaded from bf16. Experts are read one by one into the fused parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.dsv3.checkpoint_checks_dsv3 import scale_grid
from ..models.dsv3.checkpoint_conversion_dsv3 import MergeExperts
from ..models.dsv3.checkpoint_dsv3 import FP8_METHOD
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor


@torch.no_grad()
def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """`weight * scale` of each block, computed in float32 and rounded once to `out.dtype`.

    Args:
        weight: (R, C), FP8 or any dtype that holds its values exactly.
        scale: (ceil(R / rows of a block), ceil(C / columns of a block)), float.
        block_size: rows and columns of a block; the last ones may be partial.
        out: (R, C), on the same device as `weight`; written and returned.

    Raises:
        ValueError: where `scale` is not the ceiling grid of `weight`.
    """
    rows, columns = weight.shape
    block_rows, block_columns = block_size
    grid = scale_grid(weight.shape, block_size)
    if tuple(scale.shape) != grid:
        raise ValueError(
            f"weight {(rows, columns)} in blocks of {tuple(block_size)} needs scales {grid}, got {tuple(scale.shape)}"
        )
    # One row of blocks at a time keeps the float32 values small (3.7 MB at 7168 columns)
    scale_of_column = scale.to(weight.device, torch.float32).repeat_interleave(block_columns, dim=1)[:, :columns]
    for i in range(grid[0]):
        block_row = slice(i * block_rows, (i + 1) * block_rows)
        out[block_row] = weight[block_row].to(torch.float32).mul_(scale_of_column[i])
    return out


class MergeFp8Experts(MergeExperts):
    """[`MergeExperts`] that dequantises each expert into its place. Experts without a scale are copied."""

    def __init__(self, dim: int, block_size: tuple[int, int]):
        super().__init__(dim)
        self.block_size = block_size

    def fill(self, out: torch.Tensor, stored: StoredTensor, scale: StoredTensor | None) -> None:
        if scale is None:
            super().fill(out, stored, scale)
        else:
            dequantize_blocks(stored.read(), scale.read(), self.block_size, out)


class DequantizeBlocks(ConversionOps):
    """A weight and its scale to the weight in the parameter's dtype. Weights without a scale pass unchanged."""

    def __init__(self, block_size: tuple[int, int]):
        self.block_size = block_size

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
        assert model is not None and full_layer_name is not None
        (weight,) = input_dict["weight"]
        if "weight_scale_inv" in input_dict:
            (scale,) = input_dict["weight_scale_inv"]  # both unread, see `StoredTensor.deferred`
            values = weight.read()
            out = torch.empty(values.shape, dtype=model.get_parameter(full_layer_name).dtype, device=values.device)
            weight = dequantize_blocks(values, scale.read(), self.block_size, out)
        return {full_layer_name: weight}


class DeepseekFp8Config(QuantizationConfigMixin):
    """`quantization_config` of a DeepSeek FP8 checkpoint, as this reader takes it.

    Args:
        weight_block_size (`tuple[int, int]`, defaults to `(128, 128)`): rows and columns that share a scale.
        kwargs: the format's other fields (`fmt`, `activation_scheme`, …), which say nothing about the weights' values.
    """

    # Tells Transformers to drop the quantization config from the loaded model.
    dequantize = True

    def __init__(self, weight_block_size: tuple[int, int] = (128, 128), **kwargs: Any):
        self.quant_method = FP8_METHOD
        rows, columns = weight_block_size
        self.weight_block_size = (int(rows), int(columns))


class DeepseekFp8Quantizer(HfQuantizer):
    """Dequantises DeepSeek's FP8 checkpoints while they load, on any device. Only reads: it does not quantise."""

    requires_calibration = True

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Let the converters of experts collect scales too, and dequantise every other weight that has one."""
        block_size = self.quantization_config.weight_block_size
        updated = []
        for step in weight_conversions:
            if isinstance(step, WeightConverter) and isinstance(step.operations[0], MergeExperts):
                weights = list(step._original_source_patterns)
                # Scales first: Transformers 5.17 takes the first pattern that begins a name, not the longest
                step = WeightConverter(
                    source_patterns=[f"{weight}_scale_inv" for weight in weights] + weights,
                    target_patterns=list(step._original_target_patterns),
                    operations=[MergeFp8Experts(step.operations[0].dim, block_size), *step.operations[1:]],
                )
            updated.append(step)
        everything_else = WeightConverter(
            source_patterns=["weight_scale_inv", "weight"],
            target_patterns="weight",
            operations=[DequantizeBlocks(block_size)],
        )
        return [*updated, everything_else]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Saving reverts the conversions of loading unless the model carries none: then it reverts the registered ones,
        # which is right for a model that is no longer quantised
        model._weight_conversions = None
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register_fp8() -> None:
    """Add the reader to Transformers' quantization methods, under its own name. Repeating it does nothing."""
    if FP8_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(FP8_METHOD)(DeepseekFp8Config)
    if FP8_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(FP8_METHOD)(DeepseekFp8Quantizer)
