"""The next token of every row, each by its own request's settings and its own random numbers.

Rows do not see each other: nothing here is summed over rows, or in an order that depends on how many there are, and
each drawn token takes one number from its request's generator.

Shape suffixes: W rows, V vocabulary, N candidates.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..kernels.cpu.sample import sample, sample_refusal
from ..models.dsv3.sampling_dsv3 import BLOCK, largest, most_likely
from .requests import Constraint, SamplingSettings, TokenLogprobs


# Candidates that are sorted before all of a row are; beyond the k most likely, for those as likely as the k-th
_CANDIDATES, _SPARE = 256, 16
# Rows of fewer columns are summed as they are
_SHORT = 2048


class UnsoundLogits(ValueError):
    """The model gave logits from which nothing can be drawn."""


class Sampler:
    """How one request's tokens are drawn, and what was drawn so far.

    Args:
        settings: the request's.
        prompt: its tokens.
        ends: tokens that end its text, which `min_new_tokens` forbids first.
        constraint: its grammar.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        prompt: Sequence[int],
        ends: Sequence[int] = (),
        constraint: Constraint | None = None,
    ):
        self.settings, self.constraint = settings, constraint
        self.is_greedy = settings.temperature == 0
        self.filters = bool(settings.top_k) or settings.top_p < 1 or settings.min_p > 0
        # Python takes a seed's absolute value
        self._random = random.Random(None if settings.seed is None else settings.seed % 2**64)
        self._ends = torch.tensor(sorted(set(ends)), dtype=torch.int64)
        self._bias = dict(settings.logit_bias)
        self._said = Counter[int]()
        # What a repetition penalty is for, once each, beside the same as a tensor
        self._seen = set(prompt if settings.repetition_penalty != 1 else ())
        self._seen_N = torch.tensor(list(self._seen), dtype=torch.int64)
        self.drawn = 0

    @property
    def changes_scores(self) -> bool:
        """Whether scores are others than the model's before they are drawn from."""
        settings = self.settings
        return bool(
            self.constraint is not None
            or self._bias
            or settings.repetition_penalty != 1
            or settings.presence_penalty
            or settings.frequency_penalty
            or (self.drawn < settings.min_new_tokens and self._ends.numel())
        )

    def change(self, scores_V: torch.Tensor) -> None:
        """Penalties, biases, what may not come yet, and the grammar, in place."""
        settings, device = self.settings, scores_V.device
        if settings.repetition_penalty != 1:
            seen = self._seen_N.to(device)
            scores = scores_V[seen]
            scores_V[seen] = torch.where(
                scores < 0, scores * settings.repetition_penalty, scores / settings.repetition_penalty
            )
        if self._said and (settings.presence_penalty or settings.frequency_penalty):
            said = torch.tensor(list(self._said), device=device)
            times = torch.tensor(list(self._said.values()), dtype=scores_V.dtype, device=device)
            scores_V[said] -= settings.presence_penalty + settings.frequency_penalty * times
        if self._bias:
            bias = torch.tensor(list(self._bias.values()), dtype=scores_V.dtype, device=device)
            scores_V[torch.tensor(list(self._bias), device=device)] += bias
        if self.drawn < settings.min_new_tokens:
            scores_V[self._ends.to(device)] = -torch.inf
        if self.constraint is not None:
            self.constraint.allow(scores_V)

    def next_number(self) -> float:
        """In [0, 1), for one token."""
        return self._random.random()

    def accept(self, token: int) -> None:
        """Takes a token that was drawn."""
        self.drawn += 1
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.settings.presence_penalty or self.settings.frequency_penalty:
            self._said[token] += 1
        if self.settings.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            self._seen_N = torch.cat((self._seen_N, torch.tensor([token])))


@dataclass(frozen=True)
class Drawn:
    """A row's next token, with its log-probabilities where they were asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


def draw(logits_WV: torch.Tensor, samplers: Sequence[Sampler]) -> list[Drawn | Exception]:
    """The next token of each row, which its sampler has accepted, or why there is none: errors are their row's alone.

    Args:
        logits_WV: the model's, of any floating type; not changed.
    """
    sound = logits_WV.sum(dim=-1, dtype=torch.float32).isfinite().tolist()
    results: dict[int, int | Exception] = {}
    changed: dict[int, torch.Tensor] = {}
    for row, (sampler, is_sound) in enumerate(zip(samplers, sound, strict=True)):
        if not is_sound:
            results[row] = UnsoundLogits("The model's logits are not finite.")
        elif sampler.changes_scores:
            try:
                scores_V = logits_WV[row].to(torch.float32, copy=True)
                sampler.change(scores_V)
                if not bool(scores_V.amax() > -torch.inf):
                    raise UnsoundLogits("No token is allowed to come next.")
                changed[row] = scores_V
            except Exception as error:  # a grammar is another library's
                results[row] = error
    left = [row for row in range(len(samplers)) if row not in results]
    if sample_refusal(logits_WV) is None:
        for rows in ([row for row in left if row not in changed], [row for row in left if row in changed]):
            if rows:
                drawn = _sample_compiled(_scores(logits_WV, rows, changed), [samplers[row] for row in rows])
                results.update(zip(rows, drawn, strict=True))
        left = []
    for greedy, filters in ((True, None), (False, False), (False, True)):
        rows = [
            row
            for row in left
            if samplers[row].is_greedy == greedy and (filters is None or samplers[row].filters == filters)
        ]
        if not rows:
            continue
        scores_WV = _scores(logits_WV, rows, changed)
        if greedy:
            tokens = most_likely(scores_WV).tolist()
        else:
            tokens = _sample(scores_WV, [samplers[row] for row in rows], bool(filters))
        results.update(zip(rows, tokens, strict=True))
    return [_finish(logits_WV[row], sampler, results[row]) for row, sampler in enumerate(samplers)]


def _finish(logits_V: torch.Tensor, sampler: Sampler, result: int | Exception) -> Drawn | Exception:
    if isinstance(result, Exception):
        return result
    try:
        sampler.accept(result)
    except Exception as error:
        return error
    top = sampler.settings.logprobs
    return Drawn(result, None if top is None else token_logprobs(logits_V[None], [result], top)[0])


def token_logprobs(logits_WV: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities that a model gives to a token of each row and to the `top` likeliest ones.

    They are the model's own, before temperature, penalties and biases.
    """
    scores_WV = logits_WV.float()
    norm_W = scores_WV.logsumexp(dim=-1).tolist()
    chosen_W = scores_WV.gather(1, torch.tensor(tokens, device=scores_WV.device)[:, None])[:, 0].tolist()
    best: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if top:
        values_WN, tokens_WN = largest(scores_WV, min(top, scores_WV.shape[1]))
        best = [list(zip(ids, values)) for ids, values in zip(tokens_WN.tolist(), values_WN.tolist())]
    return [
        TokenLogprobs(token, value - norm, tuple((other, score - norm) for other, score in likeliest))
        for token, value, norm, likeliest in zip(tokens, chosen_W, norm_W, best)
    ]


def _scores(logits_WV: torch.Tensor, rows: list[int], changed: dict[int, torch.Tensor]) -> torch.Tensor:
    """Scores of some rows, as their samplers have changed them."""
    if not changed.keys() & rows:
        return logits_WV if len(rows) == len(logits_WV) else logits_WV[rows]
    scores_WV = logits_WV[rows].float()
    for place, row in enumerate(rows):
        if row in changed:
            scores_WV[place] = changed[row]
    return scores_WV


def _sample_compiled(scores_WV: torch.Tensor, samplers: list[Sampler]) -> list[int | Exception]:
    settings = [each.settings for each in samplers]
    tokens = sample(
        scores_WV,
        [each.temperature for each in settings],
        [min(each.top_k or 0, scores_WV.shape[1]) for each in settings],
        [each.top_p for each in settings],
        [each.min_p for each in settings],
        [0.0 if each.is_greedy else each.next_number() for each in samplers],
    )
    return [token if token >= 0 else UnsoundLogits("The scores are not finite.") for token in tokens]


def _sample(scores_WV: torch.Tensor, samplers: list[Sampler], filters: bool) -> list[int]:
    device = scores_WV.device
    temperature_W1 = torch.tensor([each.settings.temperature for each in samplers], device=device)[:, None]
    number_W = torch.tensor([each.next_number() for each in samplers], dtype=torch.float64, device=device)
    scores_WV = scores_WV.float()
    weights_WV = ((scores_WV - scores_WV.amax(dim=-1, keepdim=True)) / temperature_W1).exp_()
    if not filters:
        return _place(weights_WV, number_W).tolist()
    top_k = [each.settings.top_k or weights_WV.shape[1] for each in samplers]
    limits = [(k, each.settings.top_p, each.settings.min_p) for k, each in zip(top_k, samplers)]
    # Totals are needed where top-p takes its share of the whole vocabulary
    total_W = _cumulative(weights_WV)[1][:, -1]
    listed = max((k for k in top_k if k < weights_WV.shape[1]), default=0) + _SPARE
    count = min(max(listed, _CANDIDATES), weights_WV.shape[1])
    values_WN, token_WN = largest(weights_WV, count)
    # Those of equal weight go by their number, however many were looked at
    order_WN = token_WN.argsort(dim=-1)
    values_WN, token_WN = values_WN.gather(1, order_WN), token_WN.gather(1, order_WN)
    order_WN = values_WN.argsort(dim=-1, descending=True, stable=True)
    values_WN, token_WN = values_WN.gather(1, order_WN), token_WN.gather(1, order_WN)
    tokens = []
    for row, (limit, total, number) in enumerate(zip(limits, total_W.tolist(), number_W.tolist())):
        values_N, token_N = values_WN[row], token_WN[row]
        sums_N = values_N.cumsum(dim=-1, dtype=torch.float64)
        kept = _kept(values_N, sums_N, weights_WV.shape[1], total, *limit)
        if kept == len(values_N) < weights_WV.shape[1]:  # there may be more
            values_N, token_N = weights_WV[row].sort(descending=True, stable=True)
            sums_N = values_N.cumsum(dim=-1, dtype=torch.float64)
            kept = _kept(values_N, sums_N, weights_WV.shape[1], total, *limit)
        at = int(torch.searchsorted(sums_N[:kept], number * float(sums_N[kept - 1]), right=True))
        tokens.append(int(token_N[min(at, kept - 1)]))
    return tokens


def _kept(
    values_N: torch.Tensor,
    sums_N: torch.Tensor,
    vocabulary: int,
    total: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> int:
    """How many of the likeliest tokens top-k, top-p and min-p keep, in the order in which Transformers asks them.

    As many as there are where more than these may be kept.

    Args:
        values_N: weights, largest first; the largest is 1. sums_N: their sums. total: of the whole vocabulary.
    """
    kept = len(values_N)
    if top_k < kept:
        kept = int((values_N >= values_N[top_k - 1]).sum())  # with those as likely as the k-th
        if kept == len(values_N) < vocabulary:  # what top-p takes its share of is not known
            return kept
    if kept < len(values_N):
        total = float(sums_N[kept - 1])
    if top_p < 1:
        kept = min(kept, 1 + int((sums_N < top_p * total).sum()))
    return max(1, min(kept, int((values_N >= min_p).sum())))


def _cumulative(weights_WV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in blocks `(W, blocks, block)`, and the sums `(W, blocks)` of all up to the end of each."""
    V = weights_WV.shape[1]
    block = 1 if V <= _SHORT else BLOCK
    blocks = F.pad(weights_WV, (0, -V % block)).unflatten(1, (-1, block))
    return blocks, blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _place(weights_WV: torch.Tensor, number_W: torch.Tensor) -> torch.Tensor:
    """The token of each row at which the sum of weights passes its number's share of all."""
    blocks, sums = _cumulative(weights_WV)
    target = number_W[:, None] * sums[:, -1:]
    at = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, at)
    inside = blocks.gather(1, at[:, :, None].expand(-1, -1, blocks.shape[2]))[:, 0]
    sums = inside.cumsum(dim=-1, dtype=torch.float64)
    offset = torch.searchsorted(sums, target - before, right=True)
    # Rounding may lead behind the last token that has a weight
    last = inside.shape[1] - 1 - (inside > 0).int().flip(-1).argmax(dim=-1, keepdim=True)
    return (at * blocks.shape[2] + torch.minimum(offset, last))[:, 0]
