"""A request while it is served: what is drawn and told of it, and when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Any

from .requests import Deliver, FinishReason, Output, Request, TokenLogprobs
from .sampling import Drawn, Sampler
from .scheduler import Sequence
from .text_stream import TextStream


class Served:
    """A request, its sequence, and what is known of its text.

    Args:
        ends: the model's own ends of sequence.
        decode: from token ids to text; None where texts are not told.
    """

    def __init__(
        self,
        request: Request,
        deliver: Deliver,
        ends: Tokens[int],
        decode: Callable[[list[int]], str] | None,
    ):
        settings = request.settings
        self.request, self.deliver = request, deliver
        self._ends = frozenset() if settings.ignore_eos else frozenset(ends)
        self._stops = frozenset(settings.stop_token_ids)
        self.sampler = Sampler(settings, request.prompt, (*self._ends, *self._stops), request.constraint)
        self.text = None if decode is None else TextStream(decode, settings.stop, request.prompt)
        self.sequence: Sequence | None = None
        count = len(request.prompt)
        # Of each token of the prompt; the first has none
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if settings.prompt_logprobs is None else [None] * count
        )

    def wanted_of_prompt(self, start: int, count: int) -> range:
        """Places from `start` on, among `count`, whose logits tell of the prompt's next tokens."""
        if self._prompt_logprobs is None:
            return range(0)
        return range(start, min(start + count, len(self.request.prompt) - 1))

    def tell_of_prompt(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Takes log-probabilities that the logits at places from `start` on gave to the prompt's next tokens."""
        assert self._prompt_logprobs is not None
        self._prompt_logprobs[start + 1 : start + 1 + len(logprobs)] = logprobs

    def take(self, drawn: Drawn) -> Output:
        """What to deliver for a token that was drawn."""
        settings, token = self.request.settings, drawn.token
        text = ""
        finish: FinishReason | None = None
        reason: str | int | None = None
        may_stop = self.sampler.drawn >= settings.min_new_tokens
        if may_stop and token in self._ends | self._stops:
            finish, reason = "stop", token if token in self._stops else None
        if self.text is not None and not (finish and token in self._ends):
            text, stop = self.text.add(token, may_stop)
            if stop is not None:
                finish, reason = "stop", stop
        if finish is None and self.request.constraint is not None and self.request.constraint.finished():
            finish = "stop"
        if finish is None and self.sampler.drawn >= settings.max_new_tokens:
            finish = "length"
        if finish is not None and self.text is not None and not isinstance(reason, str):
            text += self.text.end()
        logprobs = None if drawn.logprobs is None else (drawn.logprobs,)
        return self._output(tokens=(token,), text=text, logprobs=logprobs, finish_reason=finish, stop_reason=reason)

    def end(self, finish: FinishReason, error: str | None = None) -> Output:
        """What to deliver where nothing more is drawn; without the text that was held back where it cannot be read."""
        text = ""
        with contextlib.suppress(Exception):  # a tokenizer is another library's
            text = self.text.end() if self.text is not None else ""
        return self._output(text=text, finish_reason=finish, error=error)

    def _output(self, **fields: Any) -> Output:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Output(
            self.request.request_id,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=(self.sequence.cached or 0) if self.sequence else 0,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            **fields,
        )
