"""Configuration of Kimi-VL (arXiv 2504.07491), whose model type Transformers does not know."""

from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class KimiVLConfig(PreTrainedConfig):
    r"""
    Configuration of a Kimi-VL model: DeepSeek-V3's text and the tower that Kimi K2.5 has too, for pictures alone.

    Args:
        text_config (`dict` or `DeepseekV3Config`, *optional*):
            Of the text, as `deepseek_v3`.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Of the tower, in Kimi-VL's spellings (`init_pos_emb_height`) or Transformers' (`pos_emb_height`).
        media_placeholder_token_id (`int`, *optional*, defaults to 163605):
            The token in whose places pictures stand.
    """

    model_type = "kimi_vl"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    media_placeholder_token_id: int = 163605
    projection_layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        kimi = import_module(f"{__package__}.kimi")  # where a config is, its model's class is to be had
        if "auto_map" in kwargs:
            kwargs["auto_map"] = {}  # remote code, in whose place these classes are
        self.text_config = kimi.text_config_of(self.text_config)
        self.vision_config = kimi.vision_config_of(self.vision_config)
        super().__post_init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        """Its name in Transformers."""
        return self.media_placeholder_token_id

    @property
    def video_token_id(self) -> int:
        """No token: there are no videos."""
        return -1

    @property
    def projection_hidden_size(self) -> int:
        """What the projector normalises: the tower's width."""
        return self.vision_config.hidden_size  # type: ignore[union-attr,return-value]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output


__all__ = ["KimiVLConfig"]
