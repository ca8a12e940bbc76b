"""How the next tokens are chosen from logits, on the CPU: Transformers' distribution without sorting the vocabulary.

The compiled backend does it (`csrc/sample.c`); what is here does the same where there is none.

Top-k, top-p and min-p keep what is at least as likely as some token. So a token is drawn first, from a superset of
what they keep, and it is asked afterwards whether they keep it (rejection sampling): a sum over what is more likely
than the token tells. A refused token takes all that is less likely with it, so few are drawn.

Shape suffixes: B rows, V vocabulary, N candidates.
"""

import torch
from torch.nn.functional import threshold
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...kernels.cpu.sample import sample, sample_refusal


# Rows are searched in blocks, whose maxima and sums are found at the memory's speed: torch's own argmax, topk and
# cumsum are several times slower at a hundred thousand columns
BLOCK = 128
_SHORT = 2048

# In the order in which `generate` appends them, which is the one they are understood in
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)

# Tokens looked at beyond the k most likely, since those as likely as the k-th stay too: in bf16 there are often some
_SPARE = 16


def _in_blocks(values_BN: torch.Tensor) -> torch.Tensor | None:
    """A view `(B, blocks, BLOCK)` of `(B, N)`, or None where it is not worth it, or N not divisible."""
    n = values_BN.shape[1]
    return None if n <= _SHORT or n % BLOCK else values_BN.unflatten(1, (-1, BLOCK))


def most_likely(scores_BV: torch.Tensor) -> torch.Tensor:
    """Index of the largest score of each row, `(B,)`, the first of several as `argmax` gives it."""
    blocks = _in_blocks(scores_BV)
    if blocks is None:
        return scores_BV.argmax(dim=-1)
    block_B = blocks.amax(dim=-1).argmax(dim=-1)
    inside = blocks[torch.arange(len(block_B), device=block_B.device), block_B]
    return block_B * BLOCK + inside.argmax(dim=-1)


def largest(scores_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[`torch.topk`]: the `count` largest scores in descending order and their indices, both `(B, count)`."""
    blocks = _in_blocks(scores_BV)
    if blocks is None or 2 * count > blocks.shape[1]:
        return scores_BV.topk(count)
    # Outside of the blocks with the largest maxima, `count` of them, no score exceeds any of those maxima
    block_BN = blocks.amax(dim=-1).topk(count, sorted=False).indices
    inside = blocks.gather(1, block_BN[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, at = inside.topk(count)
    return values, block_BN.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def _draw_in_row(weights_BN: torch.Tensor) -> torch.Tensor:
    cumulative = weights_BN.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative[:, -1:]
    target = torch.rand(total_B1.shape, dtype=torch.float64, device=total_B1.device) * total_B1
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights_BN.shape[1] - 1)


def _draw(weights_BN: torch.Tensor) -> torch.Tensor:
    """An index `(B,)` of each row, drawn in proportion to weights that are not negative and not all 0.

    Once in 2^53 draws the sum's rounding may give an index of weight 0.
    """
    blocks = _in_blocks(weights_BN)
    if blocks is None:
        return _draw_in_row(weights_BN)
    block_B = _draw_in_row(blocks.sum(dim=-1))
    inside = blocks[torch.arange(len(block_B), device=block_B.device), block_B]
    return block_B * BLOCK + _draw_in_row(inside)


def _penalise(input_ids: torch.Tensor, scores_BV: torch.Tensor, penalty: RepetitionPenaltyLogitsProcessor) -> bool:
    """Does in place, in what was said already, what the processor does to a copy; False where it must do it itself."""
    ignored = penalty.prompt_ignore_length
    if isinstance(ignored, int) or int(input_ids.max()) >= scores_BV.shape[1]:
        return False
    if ignored is not None:
        padding = torch.arange(input_ids.shape[1]) < ignored.to(input_ids.device)[:, None]
        if len(padding) != len(input_ids) or bool(padding[:, -1].any()):
            return False
        input_ids = torch.where(padding, input_ids[:, -1:], input_ids)
    said = scores_BV.gather(1, input_ids)
    scores_BV.scatter_(1, input_ids, torch.where(said < 0, said * penalty.penalty, said / penalty.penalty))
    return True


class NextToken:
    """Chooses the next token of each row: greedily, as Transformers samples, or from that distribution in less time.

    The fast way takes over those of `generate`'s own warpers that the chain ends in; the processors before them, one's
    own among them, run as they are.

    Args:
        logits_processor: what `generate` prepared.
        do_sample: sample, or take the most likely token.
        exact: sample by Transformers' own chain, with its draws for a seed.
    """

    def __init__(self, logits_processor: LogitsProcessorList, do_sample: bool, exact: bool):
        self.do_sample, self.exact = do_sample, exact
        self.temperature, self.top_k, self.top_p, self.min_p = 1.0, 0, 1.0, 0.0
        processors = list(logits_processor)
        if do_sample and not exact:
            self._take_over(processors)
        first = processors[0] if processors else None
        self.penalty = processors.pop(0) if type(first) is RepetitionPenaltyLogitsProcessor else None
        self.processors = LogitsProcessorList(processors)
        # Whether logits are only read, of any floating type
        self.only_reads = self.penalty is None and not processors and not exact

    def _take_over(self, processors: list) -> None:
        later = len(_WARPERS)
        while processors and type(processors[-1]) in _WARPERS[:later]:
            warper = processors[-1]
            later = _WARPERS.index(type(warper))
            kept, filtered = getattr(warper, "min_tokens_to_keep", 1), getattr(warper, "filter_value", -torch.inf)
            if kept != 1 or filtered != -torch.inf:
                return
            name = ("temperature", "top_k", "top_p", "min_p")[later]
            setattr(self, name, getattr(warper, name))
            processors.pop()

    def __call__(self, input_ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Token ids `(B,)`, int64, from fp32 logits `(B, V)`, which may be changed in place unless `only_reads`."""
        scores_BV = logits_BV
        if self.penalty is not None and not _penalise(input_ids, scores_BV, self.penalty):
            scores_BV = self.penalty(input_ids, scores_BV)
        if self.processors:
            scores_BV = self.processors(input_ids, scores_BV)
        if not self.do_sample:
            return most_likely(scores_BV)
        if self.exact:
            return torch.multinomial(scores_BV.softmax(dim=-1), 1)[:, 0]
        return self._sample(scores_BV)

    def _sample(self, scores_BV: torch.Tensor) -> torch.Tensor:
        if sample_refusal(scores_BV) is None:
            B, numbers = len(scores_BV), torch.rand(len(scores_BV), dtype=torch.float64).tolist()
            filters = [self.top_k] * B, [self.top_p] * B, [self.min_p] * B
            tokens = sample(scores_BV, [self.temperature] * B, *filters, numbers)
            if min(tokens) >= 0:
                return torch.tensor(tokens)
        return self._sample_plainly(scores_BV.float())

    def _sample_plainly(self, scores_BV: torch.Tensor) -> torch.Tensor:
        weights_BN, token_BN = self._weights(scores_BV)
        totals = weights_BN.sum(dim=-1).tolist()
        if not all(total > 0 for total in totals):
            torch.multinomial(weights_BN, 1)  # raises its own error about infinite logits and NaN
        drawn_B = _draw(weights_BN)
        weights = weights_BN.gather(1, drawn_B[:, None])[:, 0].tolist()
        for row, (at, weight) in enumerate(zip(drawn_B.tolist(), weights, strict=True)):
            proposals = weights_N = weights_BN[row]
            while not self._keeps(weights_N, totals[row], at, weight):
                proposals = threshold(proposals, _just_below(weights_N[at]), 0.0)
                proposals[at] = 0.0
                at = drawn_B[row] = int(_draw(proposals[None]))
                weight = float(weights_N[at])
        return drawn_B if token_BN is None else token_BN.gather(1, drawn_B[:, None])[:, 0]

    def _weights(self, scores_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What top-k leaves: weights `(B, N)` in proportion to probabilities, the largest 1, and whose they are.

        None for the latter where the N candidates are the vocabulary.
        """
        token_BN = dropped = None
        vocabulary = scores_BV.shape[1]
        if 0 < self.top_k < vocabulary:
            values_BN, token_BN = largest(scores_BV, min(self.top_k + _SPARE, vocabulary))
            scaled_BN = values_BN / self.temperature  # equal scores are those that are equal afterwards
            least_B1 = scaled_BN[:, self.top_k - 1 : self.top_k]
            if values_BN.shape[1] == vocabulary or bool((scaled_BN[:, -1:] < least_B1).all()):
                scores_BV, dropped = values_BN, scaled_BN < least_B1
            else:
                token_BN, dropped = None, scores_BV / self.temperature < least_B1
        weights = (scores_BV - scores_BV.amax(dim=-1, keepdim=True)).div_(self.temperature).exp_()
        return weights if dropped is None else weights.masked_fill_(dropped, 0.0), token_BN

    def _keeps(self, weights_N: torch.Tensor, total: float, at: int, weight: float) -> bool:
        """Whether top-p and min-p keep the candidate `at`, of this weight.

        Top-p keeps it if what comes before it weighs less than `top_p`; of equal ones the later comes first, as in a
        stable ascending sort. (Transformers' sort is not stable: it keeps as many of them, not the same.)
        """
        if weight < self.min_p or weight == 0:
            return False
        if self.top_p >= 1:
            return True
        limit = self.top_p * total
        if float(threshold(weights_N, _just_below(weights_N[at]), 0.0).sum()) - weight < limit:
            return True
        before = float(threshold(weights_N, weight, 0.0).sum())
        if before < limit or before == 0:
            before += weight * int((weights_N[at + 1 :] == weight).sum())
        return before < limit or before == 0


def _just_below(value: torch.Tensor) -> float:
    return float(torch.nextafter(value, value.new_zeros(())))
