"""What one request asks of the engine, and what comes back: plain data, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol


FinishReason = Literal["stop", "length", "cancelled", "error"]


class RequestError(ValueError):
    """A request that cannot be served as it is: `field` names what is wrong with it."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"`{field}` {reason}")
        self.field, self.reason = field, reason


class QueueFull(RuntimeError):
    """As many requests wait as may: `retry_after` is in how many seconds one more may be taken."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s.")
        self.waiting, self.retry_after = waiting, retry_after


class Constraint(Protocol):
    """A grammar that the text of one request has to follow, such as llguidance's matcher of a JSON schema."""

    def allow(self, scores: Any) -> None:
        """Sets the scores (vocabulary,) of tokens that may not come next to minus infinity, in place."""

    def accept(self, token: int) -> None:
        """Takes the token that was drawn."""

    def finished(self) -> bool:
        """Whether nothing may follow but the end."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the text of one request is drawn. Names and meanings are those of Transformers and vLLM.

    Attributes:
        max_new_tokens: 1 or more.
        min_new_tokens: tokens before which neither an end of sequence nor a stop ends the request.
        temperature: 0 takes the likeliest token.
        top_k: 0 for all.
        top_p: in (0, 1].
        min_p: in [0, 1].
        repetition_penalty: above 0; of tokens in the prompt and in the text (Keskar et al. 2019, section 4.1).
        presence_penalty, frequency_penalty: in [-2, 2]; of tokens in the text, as OpenAI's.
        logit_bias: added to the scores of token ids.
        seed: of this request's draws, which do not depend on its neighbours. None draws one.
        stop: strings that end the text, and are no part of it.
        stop_token_ids: tokens that end it.
        ignore_eos: the model's own end of sequence ends nothing.
        logprobs: how many of the likeliest tokens are told at each place, beside the chosen one. None tells nothing.
        prompt_logprobs: the same for the prompt.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _in_range(self, "max_new_tokens", int, 1, math.inf)
        _in_range(self, "min_new_tokens", int, 0, self.max_new_tokens)
        _in_range(self, "temperature", float, 0, 100)
        _in_range(self, "top_k", int, 0, math.inf)
        _in_range(self, "top_p", float, 0, 1)
        _in_range(self, "min_p", float, 0, 1)
        _in_range(self, "repetition_penalty", float, 0, 100)
        _in_range(self, "presence_penalty", float, -2, 2)
        _in_range(self, "frequency_penalty", float, -2, 2)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise RequestError(name, "has to be above 0, not 0")
        if self.seed is not None:
            _in_range(self, "seed", int, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _in_range(self, name, int, 0, 20)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop", "has to hold strings that are not empty")
        if not all(_is(token, int) and token >= 0 for token in self.stop_token_ids):
            raise RequestError("stop_token_ids", "has to hold token ids, 0 or more")
        for token, bias in self.logit_bias.items():
            if not _is(token, int) or token < 0 or not _is(bias, float) or not -100 <= bias <= 100:
                raise RequestError(
                    "logit_bias", f"maps token ids to numbers in [-100, 100], not {token!r} to {bias!r}"
                )


@dataclass(frozen=True, eq=False)
class Features:
    """What stands in a prompt in place of tokens' embeddings: pictures, as `pictures.features_of` makes them.

    Attributes:
        places: of the prompt, ascending.
        rows: `(places, D)`, a tensor.
        keys: by which pages with these rows are found, one a place: whole numbers that no token is, equal only where
            rows are.
    """

    places: tuple[int, ...]
    rows: Any
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.places) == len(self.rows) == len(self.keys):
            sizes = f"{len(self.places)}, {len(self.rows)} and {len(self.keys)}"
            raise RequestError("features", f"have {sizes} places, rows and keys, not as many of each")
        if any(first >= second for first, second in pairwise((-1, *self.places))):
            raise RequestError("features", "have places that do not ascend")


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        request_id: no two that are served at a time have the same.
        prompt: token ids, at least one.
        settings: how it is continued.
        priority: requests of a lower number go first; within a number, those that came first.
        cache_salt: prefixes are shared among requests of one salt only, so that no tenant learns by the clock what
            another asked.
        adapter: name of one that the engine was given, or None for the model itself.
        constraint: a grammar, of this request alone.
        features: of pictures, in places of `prompt` whose tokens stand for them.
    """

    request_id: str
    prompt: tuple[int, ...]
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    constraint: Constraint | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("prompt", "is empty: give one token or more")
        if self.features is not None and self.features.places and self.features.places[-1] >= len(self.prompt):
            raise RequestError(
                "features", f"have place {self.features.places[-1]} of a prompt of {len(self.prompt)} tokens"
            )

    @property
    def keys(self) -> list[int]:
        """What tells prompts apart: their tokens, and keys in the places of pictures."""
        keys = list(self.prompt)
        if self.features is not None:
            for place, key in zip(self.features.places, self.features.keys):
                keys[place] = key
        return keys


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place: of the token that stands there, and of the likeliest, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What a request gained in one step. The last has a `finish_reason`.

    Attributes:
        tokens: new token ids. One that ended the request is among them.
        text: what can be told of them; bytes of a character that is not whole, and what may begin a stop string, are
            held back. Empty where the engine has no tokenizer.
        logprobs: one for each of `tokens` where they were asked for.
        prompt_logprobs: on the first output, where they were asked for; None in place of the first token's.
        finish_reason: "stop" for an end of sequence or a stop, "length", "cancelled", "error".
        stop_reason: the stop string or the stop token that ended it.
        error: what went wrong with this request.
        prompt_tokens, cached_tokens: of its prompt, and how many of those were found in pages of earlier requests.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


def end_tokens(given: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ends of sequence as configs have them: a token, several, or none."""
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


Deliver = Callable[[Output], None]  # called from the engine's thread; must not wait


def _is(value: object, kind: type) -> bool:
    """Whether it is a number of that kind: an int is a float, a bool is no number."""
    return not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float))


def _in_range(settings: SamplingSettings, name: str, kind: type, least: float, most: float) -> None:
    value = getattr(settings, name)
    # Neither NaN nor infinity is within limits; `isfinite` would raise for a whole number of 400 digits
    if not _is(value, kind) or not least <= value <= most:
        number = "a whole number" if kind is int else "a number"
        limits = f"of {least} or more" if most == math.inf else f"in [{least}, {most}]"
        raise RequestError(name, f"has to be {number} {limits}, not {value!r}")
