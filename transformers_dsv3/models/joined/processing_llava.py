"""LLaVA's processor with the checks of pictures, and with videos as pictures of their frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.llava import processing_llava as native

from .processing_pictures import PicturesMixin


class LlavaProcessor(PicturesMixin, native.LlavaProcessor):
    """Native's, whose files it reads and writes, and which checks what it is given.

    Raises:
        ValueError: when called, naming the picture or video that is empty, cut off, too large, or moves.
    """

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
        """[`LlavaProcessor.__call__`] of Transformers, of pictures and videos.

        Args:
            text: prompts, with `<image>` and `<video>` where pictures and videos stand.
            kwargs: for native's.

        The other arguments, and errors, are those of `InternVLProcessor.__call__`.
        """
        texts, pictures = self.checked_inputs(images, text, videos, num_frames, fps, timestamps)
        return super().__call__(images=pictures or None, text=texts, **kwargs)


__all__ = ["LlavaProcessor"]
