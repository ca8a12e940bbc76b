"""Conversations as a model reads them: by the checkpoint's template, or by a plain one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..option_error import OptionError
from .errors import ApiError, refused
from .protocol import ChatAsked


# For checkpoints that have none, which have not learned any either: `User: …`, `Assistant: …`
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content or '' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
# Templates that write a call's arguments by `tojson` take an object, the others a string of JSON
OBJECTS = re.compile(r"arguments\s*\|\s*tojson|arguments\.items\(\)")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template.

    Attributes:
        text: None where the tokenizer's own is used as it is.
        said: what it is, for people who start the server.
        stops: strings that end an answer.
        shows_tools: whether the model is told which tools there are.
    """

    text: str
    said: str
    stops: tuple[str, ...] = ()

    @property
    def shows_tools(self) -> bool:
        return "tools" in self.text

    @property
    def wants_objects(self) -> bool:
        return bool(OBJECTS.search(self.text))


def chat_template(tokenizer: Any, file: Path | None = None) -> ChatTemplate:
    """The one that is used: `file`, the checkpoint's, or the plain one.

    Raises:
        OptionError: `--chat-template`, for a file that cannot be read or is no template.
    """
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError("--chat-template", f"{file}: {error}") from None
        template = ChatTemplate(text, f"the chat template is {file}")
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hello"}], chat_template=text, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template does
            raise OptionError("--chat-template", f"{file} is no template of a conversation: {error}") from None
        return template
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    if own:
        return ChatTemplate(own, "the chat template is the checkpoint's")
    said = "the checkpoint has no chat template: conversations are written `User: …`, `Assistant: …`"
    return ChatTemplate(PLAIN, said, PLAIN_STOPS)


class Conversations:
    """Writes conversations out for one tokenizer.

    Args:
        placeholders: what stands in prompts for a part of type "image" or "video", where the model reads these.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, placeholders: Mapping[str, str] | None = None):
        self.tokenizer, self.template, self.placeholders = tokenizer, template, placeholders or {}
        self.writes_parts = all(self._writes_part(kind) for kind in self.placeholders)

    def _writes_part(self, kind: str) -> bool:
        """Whether the template gives a place to a picture, or a video, by itself."""
        content = [{"type": kind}, {"type": "text", "text": "a"}]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=self.template.text, tokenize=False
            )
        except Exception:  # whatever a template does that knows texts alone
            return False
        return bool(text.count(self.placeholders[kind]) == 1)

    def write(self, asked: ChatAsked) -> str:
        """The prompt of a conversation, as text.

        Raises:
            ApiError: 400, for what the template refuses, in its words.
        """
        for name in asked.template_arguments:
            if name in ("conversation", "chat_template", "tokenize", "return_tensors", "return_dict", "messages"):
                raise refused(f"chat_template_kwargs.{name}", "is not for requests to set")
        messages = self._messages(asked.messages)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=[copy.deepcopy(dict(tool.given)) for tool in asked.tools] or None,
                chat_template=self.template.text,
                tokenize=False,
                add_generation_prompt=asked.add_generation_prompt,
                continue_final_message=asked.continue_final_message,
                **{
                    name: value
                    for name, value in asked.template_arguments.items()
                    if name not in ("tools", "add_generation_prompt", "continue_final_message")
                },
            )
        except Exception as error:  # a template runs on what the client sent
            raise ApiError(400, f"`messages` cannot be written by the chat template: {error}", "messages") from None

    def _messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        copies: list[dict[str, Any]] = [copy.deepcopy(dict(message)) for message in messages]
        for message in copies:
            if isinstance(message["content"], list) and not self.writes_parts:
                message["content"] = "".join(
                    part["text"] if part["type"] == "text" else f"{self.placeholders[part['type']]}\n"
                    for part in message["content"]
                )
        if self.template.wants_objects:
            for place, message in enumerate(copies):
                for number, call in enumerate(message.get("tool_calls", [])):
                    try:
                        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
                    except ValueError:
                        raise refused(
                            f"messages[{place}].tool_calls[{number}].function.arguments", "is no JSON"
                        ) from None
        return copies
