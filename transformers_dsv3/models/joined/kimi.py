"""Kimi's layouts with DeepSeek-V3's text: Kimi K2.5 (`kimi_k25`) and Kimi-VL (`kimi_vl`), in their official files.

Native has the class of the former. Its conversion of names opens official files, but what it saves nobody opens:
`blocks` for `layers` in the text too. The names here are told apart by where they begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter, WeightRenaming
from transformers.models.kimi_k25 import configuration_kimi_k25
from transformers.models.kimi_k25 import modeling_kimi_k25 as native
from transformers.utils import can_return_tuple

from ..dsv3.checkpoint_conversion_dsv3 import deepseek_v3_conversion_mapping, mtp_renamings
from ..dsv3.configuration_dsv3 import DeepseekV3Config
from .configuration_kimi_vl import KimiVLConfig
from .modeling_joined import JoinedMixin


# Fields of the tower: Transformers' name, Kimi K2.5's, Kimi-VL's
_TOWER = (
    ("hidden_size", "vt_hidden_size", "hidden_size"),
    ("intermediate_size", "vt_intermediate_size", "intermediate_size"),
    ("num_attention_heads", "vt_num_attention_heads", "num_attention_heads"),
    ("num_hidden_layers", "vt_num_hidden_layers", "num_hidden_layers"),
    ("pos_emb_height", "init_pos_emb_height", "init_pos_emb_height"),
    ("pos_emb_width", "init_pos_emb_width", "init_pos_emb_width"),
    ("pos_emb_time", "init_pos_emb_time", None),
)
# From official names to those in the model
_RENAMED = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\.patch_embed\.pos_emb\.weight": "model.vision_tower.patch_embed.pos_emb.position_embeddings",
    r"^vision_tower\.patch_embed\.proj\.": "model.vision_tower.patch_embed.proj.",
    r"^vision_tower\.encoder\.final_layernorm\.": "model.vision_tower.final_layernorm.",
} | {
    rf"^vision_tower\.encoder\.blocks\.(\d+)\.{theirs}\.": rf"model.vision_tower.layers.\1.{ours}."
    for theirs, ours in {
        "norm0": "norm1",
        "norm1": "norm2",
        r"mlp\.fc0": "mlp.fc1",
        r"mlp\.fc1": "mlp.fc2",
        "wqkv": "wqkv",
        "wo": "attn.proj",
    }.items()
}
_PROJECTOR_K25 = {
    r"^mm_projector\.pre_norm\.": "model.mm_projector.pre_norm.",
    r"^mm_projector\.proj\.0\.": "model.mm_projector.in_proj.",
    r"^mm_projector\.proj\.2\.": "model.mm_projector.out_proj.",
}
_PROJECTOR_VL = {
    r"^multi_modal_projector\.pre_norm\.": "model.mm_projector.pre_norm.",
    r"^multi_modal_projector\.linear_1\.": "model.mm_projector.in_proj.",
    r"^multi_modal_projector\.linear_2\.": "model.mm_projector.out_proj.",
}


def text_config_of(fields: Any) -> DeepseekV3Config:
    """The config of a text from its fields; `kimi_k2` names the same architecture."""
    if isinstance(fields, DeepseekV3Config):
        return fields
    fields = dict(fields or {}) if isinstance(fields, Mapping) or fields is None else fields.to_dict()
    fields.pop("model_type", None)
    return DeepseekV3Config(**fields)


def vision_config_of(fields: Any) -> configuration_kimi_k25.Kimi_K25VisionConfig:
    """Native's config of a tower from fields in either official spelling, or in Transformers'."""
    if isinstance(fields, configuration_kimi_k25.Kimi_K25VisionConfig):
        fields = {name: value for name, value in fields.to_dict().items() if value is not None}
    fields = {name: value for name, value in dict(fields or {}).items() if name != "model_type"}
    for name, *theirs in _TOWER:
        for other in theirs:
            if other is not None and other in fields:
                fields[name] = fields.pop(other)
    return configuration_kimi_k25.Kimi_K25VisionConfig(**fields)


class KimiMixin(JoinedMixin):
    """What both layouts of Kimi's share.

    Attributes:
        projector_names: from official names of the projector to those in the model. picture_places: of pictures, and
            of videos, the arguments with patches and sizes, and the field of the token in whose places they stand.
    """

    projector_names: ClassVar[dict[str, str]]
    picture_places: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("pixel_values", "image_grid_thw", "image_token_id"),
    )

    @classmethod
    def _renamings(cls) -> dict[str, str]:
        return _RENAMED | cls.projector_names

    @classmethod
    def _conversions(cls, model: Any) -> list[Any]:
        of_tower = WeightConverter(
            source_patterns=["wqkv"],
            target_patterns=["attn.q_proj", "attn.k_proj", "attn.v_proj"],
            operations=[
                Chunk(dim=0),
                PermuteForRope(subconfig_key="vision_config", permute_layer_names=["q_proj", "k_proj"]),
            ],
        )
        of_tower.scope_prefix, of_tower.base_model_prefix = "vision_tower", model.base_model_prefix
        renamings = [WeightRenaming(*pair) for pair in cls._renamings().items()]
        return [*renamings, of_tower, *deepseek_v3_conversion_mapping()]

    def _conversions_to_save(self) -> list[Any]:
        return self._conversions(self)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        if expected_keys is None:
            quantizer = load_config.hf_quantizer
            mapping = cls._conversions(model)
            mapping = mapping if quantizer is None else quantizer.update_weight_conversions(mapping, model)
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        if expected_keys is None and getattr(model, "_weight_conversions", None) is not None:
            of_mtp = mtp_renamings(model.config, model.decoder_prefix)
            model._weight_conversions = [*cls._conversions(model), *of_mtp]
        return loaded

    @classmethod
    def _fit_config(cls, config: Any, stored: Any, location: str) -> None:
        super()._fit_config(config, stored, location)
        nested = config.text_config
        if (quantized := getattr(nested, "quantization_config", None)) is not None:
            config.quantization_config = quantized
            del nested.quantization_config

    def _official(self, fields: dict[str, Any]) -> None:
        if (quantized := fields.pop("quantization_config", None)) is not None:
            fields["text_config"]["quantization_config"] = quantized

    def picture_tokens(self, **pictures: Any) -> dict[str, int]:
        merged = self.config.vision_config.merge_kernel_size
        found = {}
        for pixels, grid, token in self.picture_places:
            values, grids = pictures.get(pixels), pictures.get(grid)
            if (values is None) != (grids is None):
                raise ValueError(f"`{pixels}` and `{grid}` belong together: give both.")
            if values is not None and int(grids.prod(-1).sum()) != len(values):  # type: ignore[union-attr]
                raise ValueError(
                    f"`{pixels}` has {len(values)} patches, and `{grid}` tells of {int(grids.prod(-1).sum())}."  # type: ignore[union-attr]
                )
            # Frames of a video are averaged
            tokens = 0 if grids is None else int((grids[:, 1] * grids[:, 2]).sum()) // (merged[0] * merged[1])
            found[token] = tokens
        return found

    def merged(self, input_ids: torch.Tensor, keep: bool = False, **pictures: Any) -> torch.Tensor:
        embeds = self.get_input_embeddings()(self._words(input_ids))
        known = pictures.get("mm_encoder_outputs") or {}
        for kind, (pixels, grid, token) in zip(("image", "video"), self.picture_places):
            if kind in known:
                features = list(known[kind].pooler_output)
            elif pictures.get(pixels) is not None:
                features = self._features(pictures[pixels], pictures[grid], keep)
            else:
                continue
            places = (input_ids == getattr(self.config, token))[..., None]
            embeds = embeds.masked_scatter(places, torch.cat(features).to(embeds.device, embeds.dtype))
        return embeds

    def _features(self, pixels: torch.Tensor, grid: torch.Tensor, keep: bool) -> list[torch.Tensor]:
        """Of each picture or video `(tokens, D)`. Native's own method fails for several frames."""
        parts = pixels.split(grid.prod(-1).tolist())

        def compute(places: list[int]) -> Sequence[torch.Tensor]:
            grids, (height, width) = grid[places], self.config.vision_config.merge_kernel_size
            pooled = self.model.vision_tower(
                torch.cat([parts[place] for place in places]), grid_thw=grids
            ).pooler_output
            features = self.model.mm_projector(pooled).squeeze(1)
            return features.split((grids[:, 1] * grids[:, 2] // (height * width)).tolist())  # type: ignore[no-any-return]

        return self._kept_features(parts, compute) if keep else list(compute(list(range(len(parts)))))

    def _forward(self, input_ids: Any, inputs_embeds: Any, past_key_values: Any, **kwargs: Any) -> Any:
        if kwargs.get("pixel_values_videos") is not None and input_ids is not None and inputs_embeds is None:
            # Native's own forward stops at videos of several frames, see `_features`
            pictures = {name: kwargs.pop(name, None) for name in (*self.picture_inputs, "mm_encoder_outputs")}
            self.check_pictures(input_ids, pictures)
            input_ids, inputs_embeds = None, self.merged(input_ids, **pictures)
        return super()._forward(input_ids, inputs_embeds, past_key_values, **kwargs)

    def _words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The prompt with a word in the places of pictures, whose tokens the embedding may not have."""
        for _, _, token in self.picture_places:
            input_ids = input_ids.masked_fill(input_ids == getattr(self.config, token), 0)
        return input_ids


class Kimi_K25ForConditionalGeneration(KimiMixin, native.Kimi_K25ForConditionalGeneration):
    """Native's, with official names in its files and both spellings of its config."""

    native_class = native.Kimi_K25ForConditionalGeneration
    picture_inputs = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    picture_places = (
        ("pixel_values", "image_grid_thw", "image_token_id"),
        ("pixel_values_videos", "video_grid_thw", "video_token_id"),
    )
    projector_names = _PROJECTOR_K25

    @classmethod
    def prepared(cls, config: Any) -> Any:
        config = super().prepared(config)
        config.vision_config = vision_config_of(config.vision_config)
        config.projection_hidden_size = config.vision_config.hidden_size
        if (token := getattr(config, "media_placeholder_token_id", None)) is not None:
            config.image_token_id = token
        return config

    def _official(self, fields: dict[str, Any]) -> None:
        super()._official(fields)
        vision = self.config.vision_config
        for name, theirs, _ in _TOWER:
            fields["vision_config"][theirs] = getattr(vision, name)
        fields["vision_config"] |= {
            "mm_hidden_size": vision.hidden_size,
            "projector_ln_eps": self.config.projection_layer_norm_eps,
            "text_hidden_size": self.config.text_config.hidden_size,
        }
        fields["media_placeholder_token_id"] = self.config.image_token_id

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            pixel_values: `(patches, 3, P, P)`, of all pictures behind each other. image_grid_thw: `(pictures, 3)`, 1
                and the patches of height and width. The same of videos, whose first is the number of frames.

        The other arguments, and what comes out, are those of [`DeepseekV3ForCausalLM.forward`] and native's.
        """
        return self._forward(
            input_ids,
            inputs_embeds,
            past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


class KimiVLForConditionalGeneration(KimiMixin, native.Kimi_K25ForConditionalGeneration):
    """Kimi-VL, in its official files: native's tower for pictures alone, with names of its own."""

    native_class = native.Kimi_K25ForConditionalGeneration
    config: KimiVLConfig
    config_class = KimiVLConfig
    picture_inputs = ("pixel_values", "image_grid_thw")
    projector_names = _PROJECTOR_VL

    def _official(self, fields: dict[str, Any]) -> None:
        super()._official(fields)
        vision = fields["vision_config"]
        for name, _, theirs in _TOWER:
            value = vision.pop(name, None)
            if theirs is not None:
                vision[theirs] = value
        vision["model_type"] = "moonvit"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As [`Kimi_K25ForConditionalGeneration.forward`], without videos."""
        return self._forward(
            input_ids,
            inputs_embeds,
            past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


__all__ = ["KimiVLForConditionalGeneration", "Kimi_K25ForConditionalGeneration"]
