"""InternVL's layout with DeepSeek-V3's text: tiles of pictures, and frames of videos, as `pixel_values`."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.models.internvl import modeling_internvl as native
from transformers.utils import can_return_tuple

from .modeling_joined import JoinedMixin


class InternVLForConditionalGeneration(JoinedMixin, native.InternVLForConditionalGeneration):
    """Native's, where the text is of type `deepseek_v3` or `kimi_k2`."""

    native_class = native.InternVLForConditionalGeneration
    picture_inputs = ("pixel_values",)

    @classmethod
    def _renamings(cls) -> dict[str, str]:
        return {
            r"^language_model\.model\.": "model.language_model.",
            r"^language_model\.lm_head\.": "lm_head.",
            r"^vision_tower\.": "model.vision_tower.",
            r"^multi_modal_projector\.": "model.multi_modal_projector.",
        }

    def _official(self, fields: dict[str, Any]) -> None:
        if fields["vision_config"].get("model_type") == "internvl_vision":
            fields["vision_config"]["architectures"] = ["InternVisionModel"]  # by which llama.cpp's converter knows it

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            pixel_values: `(tiles, 3, H, W)`, of all rows behind each other.
            mm_encoder_outputs: what `get_image_features` gave of them, in their stead, as `{"image": ...}`; from
                Transformers 5.19 on.

        The other arguments, and what comes out, are those of [`DeepseekV3ForCausalLM.forward`] and native's.
        """
        return self._forward(
            input_ids,
            inputs_embeds,
            past_key_values,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def picture_tokens(self, **pictures: Any) -> dict[str, int]:
        pixel_values = pictures.get("pixel_values")
        if pixel_values is None:
            return {"image_token_id": 0}
        if pixel_values.dim() != 4:
            raise ValueError(f"`pixel_values` must be `(tiles, 3, H, W)`, not of shape {tuple(pixel_values.shape)}.")
        vision = self.config.vision_config
        sides = vision.patch_size if isinstance(vision.patch_size, (list, tuple)) else [vision.patch_size] * 2
        patches = (pixel_values.shape[-2] // sides[0]) * (pixel_values.shape[-1] // sides[1])
        return {"image_token_id": len(pixel_values) * int(patches * self.config.downsample_ratio**2)}

    def merged(self, input_ids: torch.Tensor, keep: bool = False, **pictures: Any) -> torch.Tensor:
        pixels: Any = pictures.get("pixel_values")
        embeds = self.get_input_embeddings()(input_ids)

        def compute(places: list[int] | None = None) -> torch.Tensor:
            return self.get_image_features(
                pixels if places is None else pixels[places], return_dict=True
            ).pooler_output  # type: ignore[union-attr,return-value]

        if (known := pictures.get("mm_encoder_outputs")) is not None:
            features = known["image"].pooler_output
        else:
            features = torch.stack(self._kept_features(pixels, compute)) if keep else compute()
        features = features.to(embeds.device, embeds.dtype)
        return embeds.masked_scatter((input_ids == self.config.image_token_id)[..., None], features)


__all__ = ["InternVLForConditionalGeneration"]
