"""What layouts share whose pictures are tiles of one size, all of which take as many tokens: `internvl`, `llava`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .modeling_joined import JoinedMixin


class TilesMixin(JoinedMixin):
    """Goes in front of native's class, whose `get_image_features` takes `pixel_values` `(tiles, 3, H, W)`."""

    picture_inputs = ("pixel_values",)

    @classmethod
    def _renamings(cls) -> dict[str, str]:
        return {
            r"^language_model\.model\.": "model.language_model.",
            r"^language_model\.lm_head\.": "lm_head.",
            r"^vision_tower\.": "model.vision_tower.",
            r"^multi_modal_projector\.": "model.multi_modal_projector.",
        }

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

    def tile_tokens(self, patches: int) -> int:
        """Tokens of a tile of so many patches."""
        raise NotImplementedError

    def picture_tokens(self, **pictures: Any) -> dict[str, int]:
        pixel_values = pictures.get("pixel_values")
        if pixel_values is None:
            return {"image_token_id": 0}
        if pixel_values.dim() != 4:
            raise ValueError(f"`pixel_values` must be `(tiles, 3, H, W)`, not of shape {tuple(pixel_values.shape)}.")
        vision = self.config.vision_config
        sides = vision.patch_size if isinstance(vision.patch_size, (list, tuple)) else [vision.patch_size] * 2
        patches = (pixel_values.shape[-2] // sides[0]) * (pixel_values.shape[-1] // sides[1])
        return {"image_token_id": len(pixel_values) * self.tile_tokens(patches)}

    def merged(self, input_ids: torch.Tensor, keep: bool = False, **pictures: Any) -> torch.Tensor:
        pixels: Any = pictures.get("pixel_values")
        embeds = self.get_input_embeddings()(input_ids)

        def compute(places: list[int]) -> list[torch.Tensor]:
            return list(self.get_image_features(pixels[places], return_dict=True).pooler_output)

        if (known := pictures.get("mm_encoder_outputs")) is not None:
            features = list(known["image"].pooler_output)
        elif keep:
            features = self._kept_features(pixels, compute)
        else:
            features = compute(list(range(len(pixels))))
        places = (input_ids == self.config.image_token_id)[..., None]
        return embeds.masked_scatter(places, torch.cat(features).to(embeds.device, embeds.dtype))
