"""InternVL's layout with DeepSeek-V3's text: tiles of pictures, and frames of videos, as `pixel_values`."""

from typing import Any

from transformers.models.internvl import modeling_internvl as native

from .tiles import TilesMixin


class InternVLForConditionalGeneration(TilesMixin, native.InternVLForConditionalGeneration):
    """Native's, where the text is of type `deepseek_v3` or `kimi_k2`."""

    native_class = native.InternVLForConditionalGeneration

    def _official(self, fields: dict[str, Any]) -> None:
        if fields["vision_config"].get("model_type") == "internvl_vision":
            fields["vision_config"]["architectures"] = ["InternVisionModel"]  # by which llama.cpp's converter knows it

    def tile_tokens(self, patches: int) -> int:
        return int(patches * self.config.downsample_ratio**2)


__all__ = ["InternVLForConditionalGeneration"]
