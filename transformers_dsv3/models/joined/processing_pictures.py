"""What processors of pictures check and make before native's do the rest: upright pictures, frames of videos."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import checked_picture, frames_of


if TYPE_CHECKING:
    from transformers import ProcessorMixin as _Base
else:
    _Base = object


class PicturesMixin(_Base):
    """Goes in front of native's processor.

    Attributes:
        image_token, video_token: what stands in prompts for a picture and for a video.
    """

    image_token: str
    video_token: str = "<video>"

    def checked_inputs(
        self,
        images: Any,
        text: Any,
        videos: Sequence[Any] | None,
        num_frames: int | None,
        fps: float | None,
        timestamps: bool,
    ) -> tuple[list[str], list[Any]]:
        """Prompts with a place for each frame of videos, and pictures and frames in the order of the places.

        Arguments and errors are those of the processors' `__call__`.
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
        return self._with_frames(texts, pictures, clips, timestamps) if clips else (texts, pictures)

    def _with_frames(
        self,
        texts: list[str],
        pictures: list[Any],
        clips: list[tuple[list[Any], list[float] | None]],
        timestamps: bool,
    ) -> tuple[list[str], list[Any]]:
        left, clips_left, ordered = iter(pictures), iter(clips), []

        def places(match: Any) -> str:
            if match[0] == self.image_token:
                ordered.append(next(left))
                return str(match[0])
            frames, seconds = next(clips_left)
            ordered.extend(frames)
            known = seconds if timestamps and seconds is not None else [None] * len(frames)
            at = ["" if second is None else f" at {second:.1f} s" for second in known]
            return "\n".join(f"Frame{number}{when}: {self.image_token}" for number, when in enumerate(at, 1))

        tokens = f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"
        return [re.sub(tokens, places, each) for each in texts], ordered

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Transformers' own, in files that `AutoProcessor` opens with this class where this package is imported.

        By a class's name `AutoProcessor` finds native's class alone, which may need torchvision; so where a
        `config.json` is, which tells the class as well, the name is left out. Save the model first.
        """
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if os.path.isfile(os.path.join(save_directory, "config.json")) and not push_to_hub:
            for name in ("processor_config.json", "tokenizer_config.json"):
                path = Path(save_directory, name)
                fields = json.loads(path.read_text(encoding="utf-8"))
                fields.pop("processor_class", None)
                path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


def _flat(images: Any) -> list[Any]:
    """Pictures in one list, from lists for each prompt or stacks of several."""
    if isinstance(images, (list, tuple)):
        return [picture for each in images for picture in _flat(each)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]
