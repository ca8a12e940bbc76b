"""Texts that follow a grammar: JSON schemas, regular expressions and Lark grammars, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from .errors import ApiError, refused
from .protocol import Constrained


# Between the parts of JSON; without an end, some models write nothing else any more
WHITESPACE = r"(\n[ \t]{0,20}|[ \t]{1,20})"


class GrammarConstraint:
    """The grammar of one request, as the engine asks for it.

    Args:
        matcher: at its beginning. param: the field that gave it.
        after: token behind which the text has to follow it, such as the end of reasoning; None for all of it.
    """

    def __init__(self, matcher: LLMatcher, param: str, after: int | None = None):
        self.matcher, self.param, self.after = matcher, param, after
        self.failure: str | None = None

    def allow(self, scores: Any) -> None:
        """Sets scores `(V,)` of tokens that may not come next to minus infinity.

        Raises:
            ValueError: the grammar is too complex to be followed.
        """
        if self.after is not None:
            return
        mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed_V = torch.zeros(scores.shape[-1], dtype=torch.bool)
        bits = torch.from_numpy(np.unpackbits(mask, bitorder="little")[: len(allowed_V)]).bool()
        allowed_V[: len(bits)] = bits
        scores.masked_fill_(~allowed_V.to(scores.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Takes the token that was drawn; `allow` says which there are."""
        if self.after is not None:
            if token == self.after:
                self.after = None
            return
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self._check()

    def finished(self) -> bool:
        return self.after is None and self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            self.failure = self.matcher.get_error()
            raise ValueError(f"`{self.param}` cannot be followed: {self.failure}")


class Grammars:
    """Makes constraints for one vocabulary.

    Args:
        tokenizer: a fast one. vocabulary: how many scores the model gives. ends: tokens that end a text.

    Raises:
        ValueError: for a tokenizer that is not fast.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]):
        self.tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends) or None)

    def constraint(self, asked: Constrained, after: int | None = None) -> GrammarConstraint:
        """The constraint of one request; `fork` makes those of its other choices.

        Raises:
            ApiError: 400, for a grammar that llguidance does not take, with its reason.
        """
        matcher = LLMatcher(self.tokenizer, self._grammar(asked), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0]
            raise refused(asked.param, f"is no grammar that can be followed: {reason}")
        return GrammarConstraint(matcher, asked.param, after)

    @staticmethod
    def _grammar(asked: Constrained) -> str:
        if asked.kind == "regex":
            return LLMatcher.grammar_from_regex(str(asked.grammar))
        if asked.kind == "lark":
            return LLMatcher.grammar_from_lark(str(asked.grammar))
        schema: str | Mapping[str, Any] = asked.grammar
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise refused(asked.param, f"is no JSON schema: {error}") from None


def fork(constraint: GrammarConstraint) -> GrammarConstraint:
    """Another at the same place, for another choice of the same request."""
    return GrammarConstraint(constraint.matcher.deep_copy(), constraint.param, constraint.after)


def no_grammars(asked: Constrained) -> ApiError:
    return refused(asked.param, "cannot be followed: the checkpoint has no fast tokenizer")
