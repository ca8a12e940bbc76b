"""Pictures and videos of requests: their bytes, then the picture, each checked before the next step is paid for."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
from pathlib import Path
from typing import Any

from ..models.joined.pictures import checked_picture, frames_of
from .errors import ApiError, refused
from .fetching import FetchError, fetch
from .fields import kind_of
from .messages import Media
from .settings import MediaLimits


FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# How a file of video begins, and where. Readers of video take lists of other files' names for one, too
_CONTAINERS = {b"ftyp": (4, ".mp4"), b"\x1a\x45\xdf\xa3": (0, ".webm"), b"AVI ": (8, ".avi")}
# Pixels that are decoded of a video at most, over those that are taken
_DECODED = 100


def content_of(media: Media, limits: MediaLimits) -> bytes:
    """The file that a URL holds or leads to.

    Raises:
        ApiError: 400, naming the URL's field.
    """
    url, param = media.url, media.param
    scheme, colon, rest = url.partition(":")
    if scheme.lower() in ("http", "https") and colon:
        if not limits.hosts:
            raise refused(param, "is an address, and this server fetches nothing: send a `data:` URL with base64")
        try:
            return fetch(url, limits.hosts, limits.file_bytes, limits.fetch_seconds)
        except FetchError as error:
            raise refused(param, str(error)) from None
    head, comma, data = rest.partition(",")
    if scheme.lower() != "data" or not comma:
        raise refused(param, f"has to be a `data:` URL with base64, not {kind_of(url)}")
    kind, *marks = head.split(";")
    if "base64" not in [mark.strip().lower() for mark in marks]:
        raise refused(param, "has to be in base64: `data:image/png;base64,…`")
    if kind and not kind.lower().startswith((f"{media.kind}/", "application/octet-stream")):
        raise refused(param, f"is of type {kind[:40]}, not {media.kind}/…")
    if len(data) // 4 * 3 > limits.file_bytes + 2:
        raise refused(param, f"is larger than {limits.file_bytes:,} bytes")
    try:
        content = base64.b64decode(data.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise refused(param, f"is no base64: {error}") from None
    if len(content) > limits.file_bytes:
        raise refused(param, f"is larger than {limits.file_bytes:,} bytes")
    return content


class Decoder:
    """Decodes the pictures and videos of one request, as long as they have no more pixels than allowed together.

    Attributes:
        left: pixels that may still come.
    """

    def __init__(self, limits: MediaLimits):
        self.limits, self.left = limits, limits.pixels

    def picture(self, content: bytes, param: str) -> Any:
        """A picture as Pillow has it, upright.

        Raises:
            ApiError: 400, naming the field.
        """
        from PIL import Image

        if not content:
            raise refused(param, "holds no bytes")
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Exception as error:  # of all that readers of formats may raise for a client's bytes
            reason = "too many pixels" if isinstance(error, Image.DecompressionBombError) else _said(error)
            raise refused(param, f"is no picture of {', '.join(FORMATS)}: {reason}") from None
        try:
            self._take(picture.width * picture.height, f"{picture.width} x {picture.height} pixels")
            if getattr(picture, "is_animated", False):  # its frames are not counted: there may be a million
                raise ValueError("it moves: send one of its frames, or a video")
            return checked_picture(picture, "the picture")
        except Exception as error:
            raise refused(param, f"is no picture that can be taken: {_said(error)}") from None

    def video(self, content: bytes, param: str) -> list[Any]:
        """Frames of a video at equal distances, each as Pillow has it.

        Raises:
            ApiError: 400, naming the field.
        """
        from PIL import Image

        suffix = next((end for mark, (at, end) in _CONTAINERS.items() if content[at : at + len(mark)] == mark), None)
        if suffix is None:
            raise refused(param, "is no video of MP4, WebM, Matroska or AVI")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"video{suffix}")
            path.write_bytes(content)
            try:
                frames, _ = frames_of(path, "it", num_frames=self.limits.frames, check=self._check_video)
                return [Image.fromarray(frame) for frame in frames]
            except ImportError as error:
                raise ApiError(400, f"this server reads no videos: {error}", param) from None
            except Exception as error:
                said = _said(error).replace(f" ({path})", "").replace(str(path), "it")
                raise refused(param, f"is no video that can be taken: {said}") from None

    def _check_video(self, frames: int, width: int, height: int, taken: int) -> None:
        pixels = width * height
        if frames * pixels > _DECODED * self.limits.pixels:
            most = _DECODED * self.limits.pixels
            raise ValueError(f"{frames} frames of {width} x {height} pixels are more than {most:,} pixels")
        self._take(taken * pixels, f"{taken} frames of {width} x {height} pixels")

    def _take(self, pixels: int, what: str) -> None:
        if pixels > self.left:
            beside = "" if self.left == self.limits.pixels else f", of which {self.left:,} are left"
            raise ValueError(f"{what} are more than a request's {self.limits.pixels:,}{beside}")
        self.left -= pixels


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
