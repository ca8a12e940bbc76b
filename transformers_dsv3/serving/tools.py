"""Calls of tools, told apart from the answer as text comes in: DeepSeek's tokens, Kimi's, and calls in JSON."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .reasoning import held_back


# DeepSeek-V3's and R1's `function<sep>NAME\n```json\n{…}\n``` ` and V3.1's `NAME<sep>{…}`
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK_CALL = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|$)", re.DOTALL)
FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*$", re.DOTALL)
# Kimi-K2's `functions.NAME:0<argument>{…}`
KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
KIMI_CALL = re.compile(
    r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|$)", re.DOTALL
)
SECTIONS = (DEEPSEEK, KIMI)


@dataclass(frozen=True)
class ToolCall:
    """`arguments`: JSON, as the model wrote it."""

    name: str
    arguments: str
    call_id: str

    def as_message(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


def new_call(name: str, arguments: str) -> ToolCall:
    return ToolCall(name, arguments, f"call_{uuid.uuid4().hex[:24]}")


class ToolSplitter:
    """Splits an answer that comes in pieces into text and calls. A call is told when it is whole.

    Args:
        choice: `ChatAsked.tool_choice`. Where a call was asked for, the whole text is JSON that follows its schema.
    """

    def __init__(self, choice: str = "auto"):
        self.choice = choice
        self.buffer = ""
        self.section: tuple[str, str] | None = None

    def feed(self, text: str, last: bool = False) -> Iterator[str | ToolCall]:
        """What can be told. `last`: nothing comes any more."""
        self.buffer += text
        if self.choice != "auto":
            if last:
                yield from self._asked_for()
            return
        while True:
            if self.section is None:
                found = [(self.buffer.index(pair[0]), pair) for pair in SECTIONS if pair[0] in self.buffer]
                if not found:
                    keep = 0 if last else held_back(self.buffer, *(begin for begin, _ in SECTIONS))
                    told, self.buffer = self.buffer[: len(self.buffer) - keep], self.buffer[len(self.buffer) - keep :]
                    if told:
                        yield told
                    return
                place, self.section = min(found)
                if place:
                    yield self.buffer[:place]
                self.buffer = self.buffer[place:]
            begin, end = self.section
            inside, mark, after = self.buffer.partition(end)
            if not mark and not last:
                return
            calls = list(_calls(inside[len(begin) :]))
            if calls:
                yield from calls
            else:  # not what it looked like
                yield inside + mark
            self.buffer, self.section = after, None
            if not self.buffer:
                return

    def _asked_for(self) -> Iterator[str | ToolCall]:
        kind, _, name = self.choice.partition(":")
        try:
            value = json.loads(self.buffer)
            if kind == "function":
                yield new_call(name, self.buffer)
            else:
                for call in value:
                    yield new_call(call["name"], json.dumps(call["parameters"], ensure_ascii=False))
        except (ValueError, KeyError, TypeError):  # the text ended before the JSON did
            if self.buffer:
                yield self.buffer
        self.buffer = ""


def _calls(section: str) -> Iterator[ToolCall]:
    for head, body in DEEPSEEK_CALL.findall(section):
        fenced = FENCED.match(body)
        if fenced:
            yield new_call(fenced[1], fenced[2])
        elif is_object(body):
            yield new_call(head.strip(), body.strip())
    for head, body in KIMI_CALL.findall(section):
        if is_object(body):
            name = head.strip().removeprefix("functions.").rpartition(":")[0] or head.strip()
            yield ToolCall(name, body.strip(), head.strip())


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), Mapping)
    except ValueError:
        return False
