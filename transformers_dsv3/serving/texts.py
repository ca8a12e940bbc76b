"""Text to token ids and back, beside the engine, which has a tokenizer's other uses."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import refused


T = TypeVar("T")
# Characters from which on the loop does not wait for a text to be taken apart: about a millisecond
LONG = 4000


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable Latin-1 stands for itself."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Texts:
    """One tokenizer, for requests.

    Args:
        tokenizer: Transformers'. sequence: tokens of prompt and text together.
    """

    def __init__(self, tokenizer: Any, sequence: int):
        self.tokenizer, self.sequence = tokenizer, sequence
        self.longest = max((len(piece) for piece in tokenizer.get_vocab()), default=1)
        self.special = frozenset(tokenizer.all_special_ids)
        # Two, so that one long text does not keep all others waiting
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="texts")
        self.tokenizer("a", add_special_tokens=False)  # sets what threads must not set at a time
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.byte_level = backend is not None and "ByteLevel" in str(getattr(backend, "decoder", ""))

    def encode(self, text: str, param: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """
        Raises:
            ApiError: 400, for a text that is longer than any that the model takes.
        """
        # No token stands for more characters, so that longer texts need not be taken apart to be refused
        if len(text) > self.longest * self.sequence:
            raise self.too_long(param, len(text) // self.longest)
        return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def too_long(self, param: str, tokens: int) -> Exception:
        return refused(
            param,
            f"has {tokens} tokens or more: the model takes {self.sequence}, the text it writes included",
            "context_length_exceeded",
        )

    def decode(self, tokens: tuple[int, ...] | list[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self, token: int) -> bytes | None:
        """What a token stands for, where that can be told of it alone."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if self.byte_level and all(letter in _byte_letters() for letter in piece):
            return bytes(_byte_letters()[letter] for letter in piece)
        text = self.decode([token])
        return None if "\ufffd" in text else text.encode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """As OpenAI writes tokens: text, or `bytes:\\xe4` where they are part of a character."""
        found = self.token_bytes(token)
        if found is None:
            return self.decode([token])
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    async def aside(self, size: int, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function on a text of that many characters, aside where it would keep others waiting."""
        if size < LONG:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)
