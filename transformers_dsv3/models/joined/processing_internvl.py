"""InternVL's processor where torchvision is missing or does not load: pictures need Pillow alone."""

from __future__ import annotations

from typing import Any

from transformers.models.internvl import processing_internvl as native
from transformers.utils import is_torchvision_available


class InternVLProcessor(native.InternVLProcessor):
    """Native's, whose files it reads and writes. Without torchvision it has no `video_processor`."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        attributes: list[str] = super().get_attributes()
        return [name for name in attributes if name != "video_processor" or is_torchvision_available()]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, video_processor, image_seq_length, chat_template, **kwargs)
