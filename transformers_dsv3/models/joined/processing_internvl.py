"""InternVL's processor where torchvision is missing or does not load: pictures and frames need Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.internvl import processing_internvl as native
from transformers.utils import is_torchvision_available

from .processing_pictures import PicturesMixin


class InternVLProcessor(PicturesMixin, native.InternVLProcessor):
    """Native's, whose files it reads and writes. It needs no torchvision, and checks what it is given.

    Without torchvision it has no `video_processor`: frames go through the image processor, each as one tile.

    Args:
        image_processor, tokenizer, video_processor: native's, of the checkpoint.
        image_seq_length: tokens of a tile. chat_template: takes messages with pictures.
        kwargs: other fields of native's.

    Raises:
        ValueError: when called, naming the picture or video that is empty, cut off, too large, or moves.
    """

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

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Sequence[Any] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        timestamps: bool = False,
        **kwargs: Any,
    ) -> Any:
        """[`InternVLProcessor.__call__`] of Transformers, of pictures and videos of any lengths.

        Args:
            images: pictures as Pillow has them, arrays, or paths; turned upright as their EXIF data say.
            text: prompts, with `<IMG_CONTEXT>` and `<video>` where pictures and videos stand.
            videos: each a list of frames, an array of them, or a file's path, which PyAV or OpenCV reads.
            num_frames, fps: of files: so many frames, or so many in a second; 8 frames without either.
            timestamps: whether the prompt tells of frames of files at which second they are shown.

        Raises:
            ValueError: naming the picture or video that cannot be decoded, is too large or has no frames, and where
                prompts have more or fewer places than there are of them.
        """
        texts, pictures = self.checked_inputs(images, text, videos, num_frames, fps, timestamps)
        if videos:
            kwargs["crop_to_patches"] = False  # a frame is one tile, and the pictures beside it are
        return super().__call__(images=pictures or None, text=texts, **kwargs)


__all__ = ["InternVLProcessor"]
