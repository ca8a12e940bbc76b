"""LLaVA's layout with DeepSeek-V3's text: CLIP's and SigLIP's towers, a token for each of a picture's patches."""

from typing import Any

from transformers.models.llava import modeling_llava as native

from .tiles import TilesMixin


# Types of towers, and the tokens that they give beside those of the patches
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class LlavaForConditionalGeneration(TilesMixin, native.LlavaForConditionalGeneration):
    """Native's, where the text is of type `deepseek_v3` or `kimi_k2` and the tower is CLIP's or SigLIP's."""

    native_class = native.LlavaForConditionalGeneration

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        tower = getattr(getattr(config, "vision_config", None), "model_type", None)
        reason = None if tower in TOWERS else f"a tower of type {tower}, not {' or '.join(TOWERS)}"
        return super().refusal(config) or reason

    @classmethod
    def _renamings(cls) -> dict[str, str]:
        return {r"^vision_tower\.vision_model\.": "model.vision_tower.", **super()._renamings()}

    def tile_tokens(self, patches: int) -> int:
        is_first_left_out = self.config.vision_feature_select_strategy == "default"
        return patches + TOWERS[self.config.vision_config.model_type] - is_first_left_out


__all__ = ["LlavaForConditionalGeneration"]
