"""What [`join`] makes of InternVL's tower: an `internvl` checkpoint, with tiles of pictures."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLConfig

from .internvl import InternVLForConditionalGeneration as MODEL
from .processing_internvl import InternVLProcessor
from .towers import has_image_processor


PICTURE = "<IMG_CONTEXT>"
# By the names that the processor asks a tokenizer for
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": PICTURE,
    "video_token": "<video>",
}


def config_of(tower: Any, text: Any, tokenizer: Any) -> InternVLConfig:
    """The config of a tower and the config of a text as one."""
    vision = tower.config
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size))
    if rows != columns:
        raise ValueError(f"`vision`: pictures of {rows} x {columns} patches are not square, as InternVL's have to be.")
    ratio = 1.0 if rows % 2 else 0.5
    return InternVLConfig(
        vision_config=copy.deepcopy(vision),  # copies: their attention's implementation is set anew
        text_config=copy.deepcopy(text),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=int((rows * ratio) ** 2),
        downsample_ratio=ratio,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def processor_of(vision: Any, config: InternVLConfig, tokenizer: Any, template: str, tiles: int) -> InternVLProcessor:
    """The processor of such a model, with the image processor of the tower's folder where there is one."""
    height, width = config.vision_config.image_size  # type: ignore[union-attr]
    size = {"height": height, "width": width}
    if has_image_processor(vision):
        images = AutoImageProcessor.from_pretrained(vision, size=size, max_patches=tiles)
    else:
        images = GotOcr2ImageProcessorPil(
            size=size, max_patches=tiles, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        )
    parts = {"image_processor": images, "tokenizer": tokenizer}
    if "video_processor" in InternVLProcessor.get_attributes():
        from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

        parts["video_processor"] = InternVLVideoProcessor(
            size=size, image_mean=images.image_mean, image_std=images.image_std
        )
    return InternVLProcessor(**parts, image_seq_length=config.image_seq_length, chat_template=template)


__all__ = ["MODEL", "PICTURE", "TOKENS", "config_of", "processor_of"]
