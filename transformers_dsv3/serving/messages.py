"""The messages of a conversation, and the pictures and videos in them, as OpenAI and vLLM name these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import refused
from .fields import Fields, kind_of


# Parts of a message by their types, and what templates call them
MEDIA = {"image_url": "image", "video_url": "video"}


@dataclass(frozen=True)
class Media:
    """A picture or a video that stands in a message.

    Attributes:
        kind: "image" or "video". url: where it is, or all of it in a `data:` URL.
        param: what the request calls the URL: `messages[0].content[1].image_url.url`.
    """

    kind: str
    url: str
    param: str


@dataclass(frozen=True)
class Reads:
    """What a model reads beside text.

    Attributes:
        kinds: of "image" and "video". most: pictures and videos of one conversation.
        placeholders: texts that stand for them in prompts, so that no message may have them.
    """

    kinds: tuple[str, ...] = ()
    most: int = 0
    placeholders: tuple[str, ...] = ()


def read_messages(fields: Fields, reads: Reads) -> tuple[tuple[Mapping[str, Any], ...], tuple[Media, ...]]:
    """The messages of a request as templates take them, and their pictures and videos in the order of their places.

    `content` is one string, or None, or where there are pictures a list of parts, of types `text`, `image`, `video`.

    Raises:
        ApiError: 400, naming the field.
    """
    given = fields.need("messages", fields.array("messages"))
    if not given:
        raise refused("messages", "is empty: give one message or more")
    media: list[Media] = []
    messages = tuple(
        _message(Fields(message, f"messages[{place}]"), reads, media) for place, message in enumerate(given)
    )
    return messages, tuple(media)


def _message(fields: Fields, reads: Reads, media: list[Media]) -> dict[str, Any]:
    role = fields.need("role", fields.choice("role", "system", "developer", "user", "assistant", "tool"))
    content = fields.any("content")
    if isinstance(content, list):
        parts = [Fields(part, f"{fields.name('content')}[{place}]") for place, part in enumerate(content)]
        content = [_part(part, role, reads, media) for part in parts]
        if all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
    elif isinstance(content, str):
        _check_text(content, fields.name("content"), reads)
    elif content is not None:
        raise refused(fields.name("content"), f"has to be a string or a list of parts, not {kind_of(content)}")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (text := fields.text(name)) is not None:
            message[name] = text
    calls = fields.array("tool_calls")
    if calls:
        if role != "assistant":
            raise refused(fields.name("tool_calls"), "may only be in a message of the assistant")
        message["tool_calls"] = [
            _earlier_call(Fields(call, f"{fields.name('tool_calls')}[{place}]")) for place, call in enumerate(calls)
        ]
    elif content is None:
        raise refused(fields.name("content"), "is missing")
    return message


def _part(fields: Fields, role: str, reads: Reads, media: list[Media]) -> dict[str, str]:
    """A part as templates take it; pictures and videos go to `media`."""
    kind = fields.need("type", fields.text("type"))
    if kind in ("text", "refusal"):
        text = fields.need(kind, fields.text(kind))
        _check_text(text, fields.name(kind), reads)
        return {"type": "text", "text": text}
    if MEDIA.get(kind) not in reads.kinds:
        known = ", ".join(["text", *(name for name, called in MEDIA.items() if called in reads.kinds)])
        raise refused(fields.name("type"), f"is {kind_of(kind)[11:]}: this model reads {known} and nothing else")
    if role != "user":
        raise refused(fields.name("type"), f"is {kind}, which only a message of the user may have")
    if len(media) >= reads.most:
        raise refused(fields.name(kind), f"is one too many: a request may have {reads.most} pictures and videos")
    place = fields.need(kind, fields.object(kind))
    place.choice("detail", "auto", "low", "high")
    media.append(Media(MEDIA[kind], place.need("url", place.text("url")), place.name("url")))
    return {"type": MEDIA[kind]}


def _check_text(text: str, param: str, reads: Reads) -> None:
    for placeholder in reads.placeholders:
        if placeholder in text:
            raise refused(param, f"has {placeholder!r}, which stands for a picture: send that as a part of its own")


def _earlier_call(fields: Fields) -> dict[str, Any]:
    function = fields.need("function", fields.object("function"))
    name = function.need("name", function.text("name"))
    return {
        "id": fields.text("id") or "",
        "type": "function",
        "function": {"name": name, "arguments": function.text("arguments") or "{}"},
    }
