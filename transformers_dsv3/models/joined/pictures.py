"""Pictures and videos as they are given: opened, checked and turned upright before anything else is done."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


# Transformers' readers of video files that are asked, in this order, and what each needs
READERS = {"pyav": "av", "opencv": "cv2"}
# Pixels of the largest picture: eight times one of 4,096 x 2,560. More are refused before they are decoded
MOST_PIXELS = 2**26 + 2**24


def checked_picture(picture: Any, name: str) -> Any:
    """A picture as Pillow has it, upright; arrays and tensors, which are decoded already, as they are.

    Args:
        picture: a Pillow image, a path, an array or a tensor. name: what errors call it.

    Raises:
        ValueError: one that cannot be decoded, has too many pixels, or several frames.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, (str, os.PathLike)):
        name = f"{name} ({os.fspath(picture)})"
        if not os.path.isfile(picture):
            raise ValueError(f"{name}: no such file; a picture at an address is not fetched.")
        try:
            picture = Image.open(picture)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: no picture that can be opened ({error}).") from error
    if not isinstance(picture, Image.Image):
        return picture
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name}: {width} x {height} pixels are more than {MOST_PIXELS:,}; make it smaller.")
    if (frames := getattr(picture, "n_frames", 1)) > 1:
        raise ValueError(f"{name}: it moves, in {frames} frames: give one of them, or all as a video.")
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError) as error:  # which Pillow raises for files that end early
        raise ValueError(f"{name}: it cannot be decoded ({error}).") from error


def frames_of(
    video: Any,
    name: str,
    num_frames: int | None = None,
    fps: float | None = None,
    check: Callable[[int, int, int, int], None] | None = None,
) -> tuple[list[Any], list[float] | None]:
    """The frames of a video, and the seconds at which they are shown, None where nothing tells them.

    Args:
        video: frames as Pillow has them, an array or tensor `(frames, ...)`, or a file's path.
        name: what errors call it.
        num_frames, fps: of a file, so many frames, at equal distances, or so many in a second; 8 without either.
        check: of a file, called with how many frames it says to have, their width and height, and how many are to be
            taken, before any is decoded.

    Raises:
        ValueError: without a frame, for a file that cannot be read, and for frames that cannot be decoded.
        ImportError: of a file where neither PyAV nor OpenCV is installed.
    """
    seconds = None
    if isinstance(video, (str, os.PathLike)):
        video, seconds = _read(Path(video), name, num_frames, fps, check)
    frames: Sequence[Any] = list(video)
    if not frames:
        raise ValueError(f"{name}: it has no frames.")
    return [checked_picture(frame, f"frame {place} of {name}") for place, frame in enumerate(frames, 1)], seconds


def _read(
    path: Path,
    name: str,
    num_frames: int | None,
    fps: float | None,
    check: Callable[[int, int, int, int], None] | None,
) -> tuple[Any, list[float]]:
    import numpy as np
    from transformers.video_utils import load_video

    if not path.is_file():
        raise ValueError(f"{name} ({path}): no such file; a video at an address is not fetched.")
    backend = next((reader for reader, module in READERS.items() if importlib.util.find_spec(module)), None)
    if backend is None:
        raise ImportError(f"{name} ({path}): reading video files needs PyAV or OpenCV: pip install av")

    def places(metadata: Any, **kwargs: Any) -> Any:
        total = metadata.total_num_frames
        if not total:
            raise ValueError("no frames")
        wanted = num_frames or 8
        if fps is not None:
            wanted = max(1, round(total / metadata.fps * fps))
        wanted = min(wanted, total)
        if check is not None:
            check(total, metadata.width, metadata.height, wanted)
        # The middle of equal parts of the time
        return ((np.arange(wanted) + 0.5) * total / wanted).astype(int)

    try:
        frames, metadata = load_video(str(path), backend=backend, sample_indices_fn=places)
    except Exception as error:  # each reader has its own
        raise ValueError(f"{name} ({path}): no video that can be read ({error}).") from error
    return frames, [float(place) / metadata.fps for place in metadata.frames_indices]
