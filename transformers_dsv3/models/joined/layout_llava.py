"""What [`join`] makes of CLIP's and SigLIP's towers: a `llava` checkpoint.

Native's class for `internvl` would run them, but its config makes InternVL's tower of whatever a file says. A `llava`
checkpoint has no pixel shuffle: a picture takes as many tokens as it has patches.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .llava import TOWERS
from .llava import LlavaForConditionalGeneration as MODEL
from .processing_llava import LlavaProcessor
from .towers import has_image_processor


PICTURE = "<image>"
TOKENS = {"image_token": PICTURE}
# Which layer's features are taken, and whether the first, the class token's, is left out: as LLaVA's models with
# these towers have it
_FEATURES = {"clip_vision_model": (-2, "default"), "siglip_vision_model": (-1, "full")}


def config_of(tower: Any, text: Any, tokenizer: Any) -> LlavaConfig:
    """The config of a tower and the config of a text as one."""
    vision = tower.config
    layer, strategy = _FEATURES[vision.model_type]
    return LlavaConfig(
        vision_config=copy.deepcopy(vision),  # copies: their attention's implementation is set anew
        text_config=copy.deepcopy(text),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def processor_of(vision: Any, config: LlavaConfig, tokenizer: Any, template: str, tiles: int) -> LlavaProcessor:
    """The processor of such a model, with the image processor of the tower's folder where there is one."""
    tower: Any = config.vision_config
    size = {"height": tower.image_size, "width": tower.image_size}
    if has_image_processor(vision):
        images = AutoImageProcessor.from_pretrained(vision, crop_size=size)
    elif tower.model_type == "clip_vision_model":
        images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    else:
        images = SiglipImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=TOWERS[tower.model_type],
        chat_template=template,
    )


__all__ = ["MODEL", "PICTURE", "TOKENS", "config_of", "processor_of"]
