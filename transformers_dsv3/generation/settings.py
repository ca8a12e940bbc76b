"""What an engine may take of memory and time. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """What one engine may take of memory and time.

    Attributes:
        cache_bytes: memory for latents; a quarter of what is free unless given (four fifths of a GPU's), and never
            more than `max_running` of the longest sequences take.
        page_size: tokens of a page. Prefixes are shared by whole pages, and the rest of one is copied.
        max_batch_tokens: tokens that a step computes, at most.
        max_running: texts that are continued at a time; what comes beyond them waits.
        max_waiting: requests that may wait; what comes beyond them is refused.
        max_sequence: tokens of a prompt and its text; the model's own limit unless given.
        target_tpot: seconds between two tokens of a text that prompts of others and their number may lead to. Unless
            given, the number is `max_running`, and prompts may make a step take four times as long as it would with
            all that wait, and have places, being continued.

    Raises:
        ValueError: which names the field.
    """

    cache_bytes: int | None = None
    page_size: int = 32
    max_batch_tokens: int = 512
    max_running: int = 128
    max_waiting: int = 1000
    max_sequence: int | None = None
    target_tpot: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("cache_bytes", 1),
            ("page_size", 1),
            ("max_batch_tokens", 2),
            ("max_running", 1),
            ("max_waiting", 0),
            ("max_sequence", 2),
        ):
            value = getattr(self, name)
            if value is None and name in ("cache_bytes", "max_sequence"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` has to be a whole number of {least} or more, not {value!r}")
        if self.max_running >= self.max_batch_tokens:
            raise ValueError(
                f"`max_running` is {self.max_running}: a step of `max_batch_tokens={self.max_batch_tokens}` has to "
                "have room for a token of each, and for prompts"
            )
        tpot = self.target_tpot
        if tpot is not None and (not isinstance(tpot, (int, float)) or not math.isfinite(tpot) or tpot <= 0):
            raise ValueError(f"`target_tpot` has to be a number of seconds above 0, not {tpot!r}")
