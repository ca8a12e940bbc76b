"""How a server answers: names, keys, limits and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MediaLimits:
    """Of pictures and videos.

    Attributes:
        number: of both in one request.
        file_bytes: of each as a file.
        pixels: of all pictures of a request, and of the frames that are taken of its videos.
        frames: that are taken of each video.
        hosts: from which addresses are fetched, "*" for all that are public; none where there are none.
        fetch_seconds: in which one has to arrive.
    """

    number: int = 16
    file_bytes: int = 8 * 2**20
    pixels: int = 64_000_000
    frames: int = 8
    hosts: tuple[str, ...] = ()
    fetch_seconds: float = 20.0


@dataclass(frozen=True)
class ServerSettings:
    """
    Attributes:
        model_name: what clients call the model.
        adapters: names that the engine was given, each a model of its own to clients.
        api_keys: any of which has to come with a request; none needed where there are none.
        allow_origins: of other sites' pages that may ask; "*" for all.
        max_body: bytes of a request. max_reading: of all that are being received at a time.
        body_seconds: in which a body has to arrive. request_seconds: in which an answer has to be done, or None.
        send_seconds: in which a client has to take what it is sent.
        sampling: settings that stand in place of OpenAI's where a request says nothing.
    """

    model_name: str
    adapters: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    max_reading: int = 256 * 2**20
    body_seconds: float = 30.0
    request_seconds: float | None = 3600.0
    send_seconds: float = 60.0
    sampling: Mapping[str, Any] = field(default_factory=dict)


# What a checkpoint's `generation_config.json` may say, as vLLM takes it
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def checkpoint_sampling(generation_config: Any) -> dict[str, Any]:
    """What the people who trained a model recommend, of that which is within limits."""
    values = {name: getattr(generation_config, name, None) for name in SAMPLING}
    return {name: value for name, value in values.items() if value is not None and value >= 0}
