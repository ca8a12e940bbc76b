"""Draws beside Transformers' distributions, row by row and in any company."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transformers_dsv3.generation import sampling
from transformers_dsv3.generation.requests import SamplingSettings
from transformers_dsv3.generation.sampling import Drawn, Sampler, UnsoundLogits, draw, token_logprobs


def logits_of(rows, vocabulary, seed=0, scale=2.0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def sampler(prompt=(), ends=(), constraint=None, **fields):
    return Sampler(SamplingSettings(**{"max_new_tokens": 100, **fields}), prompt, ends, constraint)


def tokens_of(drawn):
    assert all(isinstance(each, Drawn) for each in drawn), drawn
    return [each.token for each in drawn]


class Grid(Sampler):
    """Takes numbers of an even grid in place of random ones, so that counts are probabilities."""

    def __init__(self, place, count, **fields):
        super().__init__(SamplingSettings(max_new_tokens=100, **fields), ())
        self.number = (place + 0.5) / count

    def next_number(self):
        return self.number


def transformers_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(min(top_k, logits.shape[-1])))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].double()).softmax(dim=-1)[0]


@pytest.mark.parametrize("vocabulary", [7, 300, 5000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_p": 0.999, "temperature": 3.0},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"top_k": 1},
    ],
    ids=str,
)
def test_distributions_are_transformers(monkeypatch, vocabulary, fields):
    """Without the compiled backend, whose own draws `tests/kernels/test_cpu_sample.py` counts."""
    monkeypatch.setattr(sampling, "sample_refusal", lambda scores: "not now")
    logits, count = logits_of(1, vocabulary)[0], 1000
    grid = [Grid(place, count, **fields) for place in range(count)]
    counts = torch.bincount(torch.tensor(tokens_of(draw(logits.expand(count, -1), grid))), minlength=vocabulary)
    expected = transformers_probabilities(logits, **fields)
    assert ((counts / count - expected).abs() <= 1.01 / count).all()
    assert not counts[expected == 0].any()


@given(
    seed=st.integers(0, 10**6),
    fields=st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([0, 1, 3, 300]),
            "top_p": st.sampled_from([1.0, 0.9, 0.2]),
            "min_p": st.sampled_from([0.0, 0.05]),
            "temperature": st.sampled_from([0.2, 1.0, 8.0]),
        }
    ),
    vocabulary=st.sampled_from([5, 400, 3000]),
)
@example(seed=0, fields={"top_k": 300, "top_p": 0.2, "min_p": 0.0, "temperature": 1.0}, vocabulary=3000)
@settings(max_examples=40, deadline=None)
def test_scores_of_which_many_are_equal(seed, fields, vocabulary):
    """As in bf16: of those as likely as the last one kept, top-k keeps all, top-p some."""
    logits, count = logits_of(1, vocabulary, seed)[0].round(), 50
    grid = [Grid(place, count, **fields) for place in range(count)]
    tokens = torch.tensor(tokens_of(draw(logits.expand(count, -1), grid)))
    expected = transformers_probabilities(logits, **{**fields, "top_p": 1.0})
    assert (expected[tokens] > 0).all()
    kept = transformers_probabilities(logits, **fields)
    assert logits[tokens].min() >= logits[kept > 0].min()


@pytest.mark.parametrize("refusal", [None, "not now"])
def test_company_changes_nothing(monkeypatch, refusal):
    """Nor does the order of rows: each row's draws are those it has alone, whatever the others ask."""
    if refusal is not None:
        monkeypatch.setattr(sampling, "sample_refusal", lambda scores: refusal)
    asked = [
        {"seed": 1},
        {"seed": 2, "temperature": 0.7, "top_p": 0.9},
        {"seed": 3, "top_k": 300, "repetition_penalty": 1.3},
        {"temperature": 0},
        {"seed": 4, "min_p": 0.01, "presence_penalty": 0.5},
        {"seed": 5, "top_k": 2, "logprobs": 3},
    ]
    logits = [logits_of(len(asked), 3000, seed) for seed in range(6)]

    def texts(order):
        order = list(order)
        samplers = {row: sampler(prompt=(1, 2), **asked[row]) for row in order}
        steps = [draw(step[order], list(samplers.values())) for step in logits]
        return {row: [step[place] for step in steps] for place, row in enumerate(order)}

    together = texts(range(len(asked)))
    assert texts(reversed(range(len(asked)))) == together
    for row in range(len(asked)):
        assert texts([row])[row] == together[row]


def test_seeds_give_the_same_again():
    logits = logits_of(1, 500).expand(20, -1)
    first, again, other = (tokens_of(draw(logits, [sampler(seed=s + i) for i in range(20)])) for s in (0, 0, 100))
    assert first == again != other
    assert tokens_of(draw(logits[:1], [sampler(seed=-1)])) == tokens_of(draw(logits[:1], [sampler(seed=2**64 - 1)]))
    assert len({tokens_of(draw(logits[:1], [sampler()]))[0] for _ in range(30)}) > 1


def test_the_likeliest_is_the_first_of_several():
    logits = torch.zeros(1, 4000)
    logits[0, [700, 3100]] = 1.0
    assert tokens_of(draw(logits, [sampler(temperature=0)])) == [700]


def test_repetition_penalty_is_transformers():
    logits = logits_of(1, 50)
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 9, 9, 20]]), logits.clone())
    drawing = sampler(prompt=(3, 9, 9), temperature=0, repetition_penalty=1.7)
    drawing.accept(20)
    scores = logits[0].clone()
    drawing.change(scores)
    torch.testing.assert_close(scores, penalised[0], rtol=0, atol=0)


def test_penalties_of_what_was_said():
    drawing = sampler(prompt=(7,), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (3, 3, 5):
        drawing.accept(token)
    scores = torch.zeros(10)
    drawing.change(scores)
    assert scores.tolist() == [0, 0, 0, -1.0, 0, -0.75, 0, 0, 0, 0]


def test_biases_and_ends_that_may_not_come_yet():
    logits = torch.zeros(1, 10)
    logits[0, 4] = 5.0
    drawing = sampler(ends=(4, 8), temperature=0, min_new_tokens=2, logit_bias={2: 1.0, 8: 100.0})
    assert [tokens_of(draw(logits, [drawing]))[0] for _ in range(3)] == [2, 2, 8]


def test_logprobs_are_the_models_own():
    logits = logits_of(2, 3000).bfloat16()
    expected = logits.double().log_softmax(dim=-1)
    drawn = draw(logits, [sampler(logprobs=4, temperature=0.3, logit_bias={11: 100.0}), sampler()])
    found = drawn[0].logprobs
    assert drawn[1].logprobs is None and found.token == drawn[0].token == 11
    assert found.logprob == pytest.approx(float(expected[0, 11]), abs=1e-5)
    values, tokens = expected[0].topk(4)
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert [value for token, value in token_logprobs(logits, [5, 6], 0)[1].top] == []


class Grammar:
    """Allows some tokens; raises where it is told to."""

    def __init__(self, allowed, error=None):
        self.allowed, self.error, self.accepted = allowed, error, []

    def allow(self, scores):
        if self.error == "allow":
            raise RuntimeError("no grammar")
        forbidden = torch.ones_like(scores, dtype=torch.bool)
        forbidden[self.allowed] = False
        scores[forbidden] = -torch.inf

    def accept(self, token):
        if self.error == "accept":
            raise RuntimeError("not of the grammar")
        self.accepted.append(token)


@pytest.mark.parametrize("refusal", [None, "not now"])
def test_errors_are_their_rows_alone(monkeypatch, refusal):
    if refusal is not None:
        monkeypatch.setattr(sampling, "sample_refusal", lambda scores: refusal)
    logits = logits_of(8, 100)
    logits[1, 50], logits[2, 50], logits[3, 50] = math.nan, math.inf, -math.inf
    grammar = Grammar([7, 9])
    samplers = [
        sampler(constraint=grammar),
        sampler(),
        sampler(temperature=0),
        sampler(top_k=2),
        sampler(constraint=Grammar([], "allow")),
        sampler(constraint=Grammar([1], "accept")),
        sampler(constraint=Grammar([])),
        sampler(temperature=0),
    ]
    drawn = draw(logits, samplers)
    assert drawn[0].token in (7, 9) and grammar.accepted == [drawn[0].token]
    assert all(isinstance(each, UnsoundLogits) for each in (*drawn[1:4], drawn[6]))
    assert str(drawn[4]) == "no grammar" and str(drawn[5]) == "not of the grammar"
    assert drawn[7].token == int(logits[7].argmax())


def test_logits_stay_as_they_are():
    logits = logits_of(3, 3000)
    before = logits.clone()
    draw(logits, [sampler(logit_bias={1: 5.0}), sampler(temperature=0), sampler(top_p=0.5)])
    assert torch.equal(logits, before)
