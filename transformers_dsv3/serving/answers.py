"""Answers in OpenAI's form: whole ones and the events of streams."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..generation.requests import Output, TokenLogprobs
from .reasoning import ReasoningSplitter
from .texts import Texts
from .tools import ToolCall, ToolSplitter


DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Usage:
    """Tokens of one HTTP request; prompts count once, however many choices they have."""

    prompt_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, prompt: int, output: Output) -> None:
        self.completion_tokens += len(output.tokens)
        if output.prompt_tokens and prompt not in self.prompt_tokens:
            self.prompt_tokens[prompt], self.cached_tokens[prompt] = output.prompt_tokens, output.cached_tokens

    def as_dict(self) -> dict[str, Any]:
        prompt = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with."""

    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        head = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": usage.as_dict()}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.object == "chat.completion" else self.object
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


class ChatChoice:
    """One choice of a chat, from the engine's outputs.

    Args:
        index: of the choice. prompt: its text, which says whether reasoning has begun. texts: of the tokenizer.
        tool_choice: None where the model has no tools.
    """

    def __init__(self, index: int, prompt: str, texts: Texts, tool_choice: str | None):
        self.index, self.texts = index, texts
        asked_for_json = tool_choice not in (None, "auto")
        self.reasoning = ReasoningSplitter(prompt)
        self.tools = None if tool_choice is None else ToolSplitter(tool_choice if asked_for_json else "auto")
        self.content, self.thoughts = "", ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[dict[str, Any]] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def deltas(self, output: Output) -> Iterator[dict[str, Any]]:
        """What an output adds, as deltas of OpenAI's, which are kept too."""
        last = output.finish_reason is not None
        for part, text in self.reasoning.feed(output.text, last):
            if part == "reasoning":
                self.thoughts += text
                yield {"reasoning_content": text}
            elif self.tools is None:
                self.content += text
                yield {"content": text}
            else:
                yield from self._answer(text, False)
        if last and self.tools is not None:
            yield from self._answer("", True)

    def _answer(self, text: str, last: bool) -> Iterator[dict[str, Any]]:
        assert self.tools is not None
        for piece in self.tools.feed(text, last):
            if isinstance(piece, ToolCall):
                yield {"tool_calls": [{"index": len(self.calls), **piece.as_message()}]}
                self.calls.append(piece)
            else:
                self.content += piece
                yield {"content": piece}

    def chunks(self, output: Output) -> Iterator[dict[str, Any]]:
        """Choices of a stream's events."""
        logprobs = self._logprobs(output)
        for delta in self.deltas(output):
            yield {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            logprobs = None
        if output.finish_reason is not None or logprobs is not None:
            self._finish(output)
            choice = {"index": self.index, "delta": {}, "logprobs": logprobs, "finish_reason": self.finish_reason}
            yield choice if output.finish_reason is None else {**choice, "stop_reason": self.stop_reason}

    def add(self, output: Output) -> None:
        """Takes an output of an answer that is told whole."""
        logprobs = self._logprobs(output)
        if logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *logprobs["content"]]
        for _ in self.deltas(output):
            pass
        self._finish(output)

    def _finish(self, output: Output) -> None:
        if output.finish_reason is not None:
            made_calls = self.calls and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if made_calls else output.finish_reason
            self.stop_reason = output.stop_reason

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        return {"content": [self._place(place) for place in output.logprobs], "refusal": None}

    def _place(self, place: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in place.top]
        return {**self._token(place.token, place.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        found = self.texts.token_bytes(token)
        return {
            "token": self.texts.token_text(token),
            "logprob": finite(logprob),
            "bytes": None if found is None else list(found),
        }

    def whole(self) -> dict[str, Any]:
        # OpenAI's is null where nothing but calls was said
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.content if self.content or not self.calls else None,
        }
        if self.thoughts:
            message["reasoning_content"] = self.thoughts
        if self.calls:
            message["tool_calls"] = [call.as_message() for call in self.calls]
        return {
            "index": self.index,
            "message": message,
            "logprobs": None if self.logprobs is None else {"content": self.logprobs, "refusal": None},
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


class TextChoice:
    """One choice of a completion, from the engine's outputs.

    Args:
        index: of the choice. echoed: text of the prompt where it is part of the answer. texts: of the tokenizer.
        prompt: its token ids, for their log-probabilities. empty: nothing but the prompt is told.
    """

    def __init__(self, index: int, echoed: str, texts: Texts, prompt: Sequence[int], empty: bool):
        self.index, self.texts, self.prompt, self.empty = index, texts, prompt, empty
        self.pending, self.text, self.offset = echoed, "", 0
        self.logprobs: dict[str, list[Any]] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def _take(self, output: Output) -> tuple[str, dict[str, list[Any]] | None]:
        places: list[TokenLogprobs | None] = list(output.prompt_logprobs or ())
        tokens = list(self.prompt[: len(places)])
        if output.logprobs is not None and not self.empty:
            places += output.logprobs
            tokens += [place.token for place in output.logprobs]
        logprobs = self._logprobs(tokens, places) if places else None
        text, self.pending = self.pending + ("" if self.empty else output.text), ""
        if output.finish_reason is not None:
            self.finish_reason = "length" if self.empty else output.finish_reason
            self.stop_reason = None if self.empty else output.stop_reason
        return text, logprobs

    def _logprobs(self, tokens: list[int], places: list[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """OpenAI's older form: parallel lists."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, place in zip(tokens, places):
            text = self.texts.token_text(token)
            told["tokens"].append(text)
            told["text_offset"].append(self.offset)
            told["token_logprobs"].append(None if place is None else finite(place.logprob))
            told["top_logprobs"].append(None if place is None else self._top(text, place))
            self.offset += len(text)
        return told

    def _top(self, text: str, place: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in place.top:
            top.setdefault(self.texts.token_text(token), finite(logprob))  # likeliest first
        top.setdefault(text, finite(place.logprob))
        return top

    def chunks(self, output: Output) -> Iterator[dict[str, Any]]:
        """Choices of a stream's events."""
        text, logprobs = self._take(output)
        if text or logprobs or output.finish_reason is not None:
            yield self._choice(text, logprobs)

    def add(self, output: Output) -> None:
        """Takes an output of an answer that is told whole."""
        text, logprobs = self._take(output)
        self.text += text
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = logprobs
            else:
                for name, values in logprobs.items():
                    self.logprobs[name] += values

    def whole(self) -> dict[str, Any]:
        return self._choice(self.text, self.logprobs)

    def _choice(self, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


def finite(logprob: float) -> float:
    """JSON has no infinity: tokens that cannot come are told as very unlikely, as vLLM tells them."""
    return max(logprob, -9999.0)
