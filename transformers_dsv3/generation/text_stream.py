"""The text of tokens as they come: nothing is told that a later token may change, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


# Stands for bytes that are no character, or not yet one
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has four bytes at most
_LONGEST_BROKEN = 3
# Tokens that are decoded together at most, and those left for the sake of the next ones
_WINDOW, _KEPT = 24, 6


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Function from token ids to text, without special tokens, that does least beside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    return lambda ids: backend.decode(ids, skip_special_tokens=True)


class TextStream:
    """The text of one request.

    Args:
        decode: from token ids to text.
        stop: strings that end the text and are no part of it.
        prompt: its last tokens decide how the first ones of the text are written.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._decode, self._stop = decode, stop
        self._window = list(prompt[-_KEPT:])  # the last tokens, whose text is known up to `_read`
        self._read = len(_whole(decode(self._window))) if self._window else 0
        self._pending = ""  # may be the beginning of a stop string

    def add(self, token: int, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that can be told after one more token, and the stop string that ends it, if one does."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = _whole(text)
        new = whole[self._read :]
        self._read = max(self._read, len(whole))
        if len(self._window) >= _WINDOW:
            self._window = self._window[-_KEPT:]
            self._read = max(0, len(self._decode(self._window)) - (len(text) - self._read))
        return self._tell(new, may_stop)

    def end(self) -> str:
        """What was held back, where nothing follows."""
        rest = self._pending + self._decode(self._window)[self._read :]
        self._pending, self._window = "", []
        return rest

    def _tell(self, new: str, may_stop: bool) -> tuple[str, str | None]:
        text = self._pending + new
        if not may_stop or not self._stop:
            self._pending = ""
            return text, None
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, stop = min(found, key=lambda each: each[0])
            return text[:place], stop
        held = max(_overlap(text, stop) for stop in self._stop)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], None


def _whole(text: str) -> str:
    """Without the end that is no character yet."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    return text[: len(text) - min(broken, _LONGEST_BROKEN)]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a string, not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
