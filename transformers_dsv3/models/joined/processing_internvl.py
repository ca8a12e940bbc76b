"""InternVL's processor where torchvision is missing or does not load: pictures and frames need Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.internvl import processing_internvl as native
from transformers.utils import is_torchvision_available

from .pictures import checked_picture, frames_of


class InternVLProcessor(native.InternVLProcessor):
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
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError("You have to specify text.")
        found = [] if images is None else _flat(images)
        pictures = [checked_picture(picture, f"picture {place}") for place, picture in enumerate(found, 1)]
        clips = [frames_of(video, f"video {place}", num_frames, fps) for place, video in enumerate(videos or [], 1)]
        for token, given, what in (
            (self.image_token, pictures, "pictures"),
            (self.video_token, clips, "videos"),
        ):
            places = sum(each.count(token) for each in texts)
            if places != len(given):
                raise ValueError(f"`text` has {places} places for {what} ({token}), and {len(given)} are given.")
        if clips:
            kwargs["crop_to_patches"] = False  # a frame is one tile, and the pictures beside it are
            texts, pictures = self._with_frames(texts, pictures, clips, timestamps)
        return super().__call__(images=pictures or None, text=texts, **kwargs)

    def _with_frames(
        self,
        texts: list[str],
        pictures: list[Any],
        clips: list[tuple[list[Any], list[float] | None]],
        timestamps: bool,
    ) -> tuple[list[str], list[Any]]:
        """Prompts with a place for each frame, and pictures and frames in the order of the places."""
        left, clips_left, ordered = iter(pictures), iter(clips), []

        def places(match: Any) -> str:
            if match.lastgroup == "image":
                ordered.append(next(left))
                return str(match.group())
            frames, seconds = next(clips_left)
            ordered.extend(frames)
            known = seconds if timestamps and seconds is not None else [None] * len(frames)
            at = ["" if second is None else f" at {second:.1f} s" for second in known]
            return "\n".join(f"Frame{number}{when}: {self.image_token}" for number, when in enumerate(at, 1))

        return [self.multimodal_pattern.sub(places, each) for each in texts], ordered


def _flat(images: Any) -> list[Any]:
    """Pictures in one list, from lists for each prompt or stacks of several."""
    if isinstance(images, (list, tuple)):
        return [picture for each in images for picture in _flat(each)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]
