"""Sampling without sorting the vocabulary: the distribution of Transformers' own chain in float64, and its draws."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tests.draws import chi_squared_deviations
from transformers_dsv3.models.dsv3 import sampling_dsv3
from transformers_dsv3.models.dsv3.sampling_dsv3 import NextToken


NOTHING = torch.zeros(1, 1, dtype=torch.long)


def chain(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The warpers as `generate` makes them."""
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def fast(processors):
    return NextToken(LogitsProcessorList(processors), do_sample=True, exact=False)


def logits(rows, vocabulary, scale, seed, rounded):
    values = scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().float() if rounded else values  # as of a bf16 model: many are equal


def probabilities(choose, scores):
    """What `choose` draws from, `(B, V)` in float64: its weights, of those candidates that it keeps."""
    weights, tokens = choose._weights(scores)
    result = torch.zeros(scores.shape, dtype=torch.float64)
    for row, values in enumerate(weights):
        total = float(values.sum())
        kept = [at for at, weight in enumerate(values.tolist()) if choose._keeps(values, total, at, weight)]
        owners = torch.tensor(kept) if tokens is None else tokens[row, kept]
        assert len(set(owners.tolist())) == len(kept)
        result[row, owners] = values[kept].double()
    return result / result.sum(dim=1, keepdim=True)


OPTIONS = {
    "temperature": st.sampled_from([1.0, 0.3, 0.8, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 20, 50, 400]),
    "top_p": st.sampled_from([1.0, 0.0, 0.05, 0.37, 0.9, 0.99]),
    "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    vocabulary=st.sampled_from([1, 7, 96, 300, 2560, 2600]),
    scale=st.sampled_from([0.1, 2.0, 8.0]),
    seed=st.integers(0, 10**6),
    rounded=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_the_distribution_is_that_of_the_chain_in_float64(rows, vocabulary, scale, seed, rounded, options):
    scores = logits(rows, vocabulary, scale, seed, rounded)
    before_top_p = chain(**{**options, "top_p": 1.0, "min_p": 0.0})(NOTHING, scores.double()).softmax(-1)
    sums = before_top_p.sort(dim=-1).values.cumsum(dim=-1)
    assume(((sums - (1 - options["top_p"])).abs() > 1e-5).all() or options["top_p"] == 1)  # not where rounding decides
    expected = chain(**options)(NOTHING, scores.double()).softmax(-1)
    found = probabilities(fast(chain(**options)), scores)
    if not rounded:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    # Of equal scores at the cut as many are kept; which of them, Transformers' sort leaves open
    torch.testing.assert_close(found.sort(-1).values, expected.sort(-1).values, rtol=1e-4, atol=1e-7)


DRAWN = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 0.9, "top_k": 50},
    "top_p": {"top_p": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.1},
    "low top_p of a flat distribution": {"temperature": 2.5, "top_p": 0.02},
    "all": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("refusal", [None, "not now"])
@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("vocabulary", [300, 2560])
def test_draws_fit_the_chain(monkeypatch, options, vocabulary, refusal, measured):
    """χ² of 8,192 draws over cells of at least 5 expected ones, with the compiled backend and without."""
    if refusal is not None:
        monkeypatch.setattr(sampling_dsv3, "sample_refusal", lambda scores: refusal)
    scores = logits(1, vocabulary, 2.0, 3, False)
    expected = chain(**options)(NOTHING, scores.double()).softmax(-1)[0]
    torch.manual_seed(1)
    choose, draws, rows = fast(chain(**options)), 8192, 64
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for _ in range(draws // rows):
        tokens = choose(NOTHING.expand(rows, 1), scores.repeat(rows, 1))
        counts += torch.bincount(tokens, minlength=vocabulary)
    assert not counts[expected == 0].any()
    deviations = chi_squared_deviations(counts, expected)
    measured["χ² of fast sampling, deviations"] = max(deviations, measured.get("χ² of fast sampling, deviations", 0))
    assert deviations < 5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.sampled_from([5, 2048, 2560, 6400]), st.integers(1, 70), st.integers(0, 10**6), st.booleans()
)
def test_blocks_find_what_torch_finds(rows, vocabulary, count, seed, rounded):
    scores = logits(rows, vocabulary, 3.0, seed, rounded)
    assert sampling_dsv3.most_likely(scores).tolist() == scores.argmax(-1).tolist()
    count = min(count, vocabulary)
    values, tokens = sampling_dsv3.largest(scores, count)
    assert values.tolist() == scores.topk(count).values.tolist()
    assert values.tolist() == scores.gather(1, tokens).tolist()
    assert all(len(set(row)) == count for row in tokens.tolist())


def takes_padding():
    """Whether this release's penalty leaves padding out; 5.17 has one length for all rows, no ids past the head."""
    try:
        return RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=torch.tensor([0])) is not None
    except ValueError:
        return False


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 10**6), st.booleans())
def test_the_penalty_in_place_is_that_of_the_processor(rows, length, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 60, (rows, length), generator=generator)
    ignored = torch.randint(0, length, (rows,), generator=generator) if padded and takes_padding() else None
    processor = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=ignored)
    scores = logits(rows, 60, 2.0, seed, False)
    expected = processor(input_ids, scores)
    assert sampling_dsv3._penalise(input_ids, scores, processor)
    assert scores.tolist() == expected.tolist()


def test_penalties_that_are_not_done_in_place_are_the_processors():
    """A vocabulary longer than the head, a prompt that is ignored by its length, padding longer than the text."""
    scores = logits(2, 20, 2.0, 0, False)
    cases = [(3, 1), *([(25, None), (3, torch.tensor([0, 9]))] if takes_padding() else [])]
    for ids, ignored in cases:
        input_ids = torch.full((2, 4), ids)
        processor = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=ignored)
        choose = NextToken(LogitsProcessorList([processor]), do_sample=False, exact=False)
        expected = processor(input_ids, scores.clone()).argmax(-1)
        assert choose(input_ids, scores.clone()).tolist() == expected.tolist()


class Forbid:
    """A processor of somebody else's, which writes to the scores it is given."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


def test_only_warpers_at_the_end_of_the_chain_are_taken_over():
    kinds = {
        "standard": (chain(0.5, 4, 0.8, 0.1), 0),
        "another before": ([Forbid(), *chain(0.5, 4)], 1),
        "another between": ([TemperatureLogitsWarper(0.5), TypicalLogitsWarper(0.9), TopKLogitsWarper(4)], 2),
        "another behind": ([*chain(0.5, 4), TypicalLogitsWarper(0.9)], 3),
        "another order": ([TopPLogitsWarper(0.5), TemperatureLogitsWarper(0.5)], 1),
        "twice": ([TopKLogitsWarper(4), TopKLogitsWarper(2)], 1),
        "another filter": ([TopKLogitsWarper(4, filter_value=-5.0)], 1),
        "subclass": ([type("Mine", (TopKLogitsWarper,), {})(4)], 1),
    }
    scores, input_ids = logits(1, 40, 2.0, 5, False), torch.tensor([[3]])
    for name, (processors, left) in kinds.items():
        choose = fast(processors)
        assert len(choose.processors) == left, name
        expected = LogitsProcessorList(processors)(input_ids, scores.double().clone()).softmax(-1)
        processed = choose.processors(input_ids, scores.clone()) if left else scores
        torch.testing.assert_close(probabilities(choose, processed), expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_logits_that_are_not_finite_raise_as_in_transformers(value, options):
    scores = logits(2, 96, 1.0, 0, False)
    scores[1, 7] = value
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        fast(chain(**options))(NOTHING.expand(2, 1), scores)


def test_forbidden_tokens_are_never_drawn():
    scores = torch.full((64, 2560), -torch.inf)
    scores[:, 77] = scores[:, 2000] = 0.0
    torch.manual_seed(0)
    for options in ({}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.5}):
        tokens = fast(chain(**options))(NOTHING.expand(64, 1), scores)
        assert set(tokens.tolist()) == {77, 2000}
