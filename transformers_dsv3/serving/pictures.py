"""Pictures and videos of conversations on their way to the engine: fetched, decoded, cut up, and through the tower."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..generation.pictures import with_pictures
from ..generation.requests import Features, RequestError
from ..models.joined.pictures import READERS
from .errors import ApiError, refused
from .media import Decoder, content_of
from .messages import Media, Reads
from .settings import MediaLimits


logger = logging.getLogger(__name__)
# Requests whose pictures wait for those of others
WAITING = 32


class Pictures:
    """Reads the pictures of requests, one request at a time, beside the engine's thread.

    Args:
        model: with a tower, of whose text the engine is. processor: of the model.
        limits: of what a request may bring.
    """

    def __init__(self, model: Any, processor: Any, limits: MediaLimits):
        self.model, self.processor, self.limits = model, processor, limits
        self.placeholders = {"image": processor.image_token}
        video = getattr(processor, "video_token", None)
        if video is not None and any(importlib.util.find_spec(module) for module in READERS.values()):
            self.placeholders["video"] = video
        self.reads = Reads(tuple(self.placeholders), limits.number, tuple(self.placeholders.values()))
        self.waiting = 0
        # Fetching is waiting; the other is for work, of which one request's at a time keeps memory bounded
        self.fetching = ThreadPoolExecutor(8, thread_name_prefix="fetching")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def shutdown(self) -> None:
        for threads in (self.fetching, self.thread):
            threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def prepare(self, text: str, media: Sequence[Media]) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Tokens of a prompt with the places of its pictures, and what the tower takes of these.

        Raises:
            ApiError: 400, naming the URL that is at fault; 429, where the pictures of too many requests wait.
        """
        if self.waiting >= WAITING:
            raise ApiError(429, "the pictures of others wait already", headers={"Retry-After": "2"})
        loop = asyncio.get_running_loop()
        with self._waiting():
            contents = [await loop.run_in_executor(self.fetching, content_of, one, self.limits) for one in media]
            return await loop.run_in_executor(self.thread, self._prepare, text, media, contents)

    def _prepare(
        self, text: str, media: Sequence[Media], contents: Sequence[bytes]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        decoder = Decoder(self.limits)
        found: dict[str, list[Any]] = {"image": [], "video": []}
        for one, content in zip(media, contents, strict=True):
            decode = decoder.picture if one.kind == "image" else decoder.video
            found[one.kind].append(decode(content, one.param))
        given = {name: found[kind] for name, kind in (("images", "image"), ("videos", "video")) if found[kind]}
        try:
            inputs = dict(self.processor(text=text, **given, add_special_tokens=False, return_tensors="pt"))
        except Exception as error:  # of another library, and of sizes that it cannot take
            logger.warning("Pictures could not be prepared.", exc_info=True)
            raise refused("messages", f"has pictures that cannot be prepared: {error}") from None
        return tuple(inputs.pop("input_ids")[0].tolist()), inputs

    async def features(
        self, tokens: tuple[int, ...], inputs: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], Features | None]:
        """A prompt and features of its pictures, for a request; those that were asked about before are kept.

        Raises:
            ApiError: 400, for a prompt that does not fit its pictures.
        """
        loop = asyncio.get_running_loop()
        try:
            with self._waiting():
                return await loop.run_in_executor(self.thread, with_pictures, self.model, tokens, inputs)
        except RequestError as error:
            raise refused("messages", f"has pictures that {error.reason}") from None
