"""`sample` beside Transformers' warpers in float64: which tokens may come, and how often they do."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.draws import chi_squared_deviations
from transformers_dsv3.kernels.cpu.sample import sample, sample_refusal


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

FP32, BF16 = torch.float32, torch.bfloat16


def draws(scores, number, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Tokens of rows of one setting, as a tensor."""
    rows = len(scores)
    options = [temperature] * rows, [top_k] * rows, [top_p] * rows, [min_p] * rows
    return torch.tensor(sample(scores, *options, number.tolist()))


def warped(scores_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What Transformers' chain makes of it in float64: probabilities `(V,)`."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        warpers.append(TopKLogitsWarper(min(top_k, len(scores_V))))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    chain = LogitsProcessorList(warpers)
    return chain(torch.zeros(1, 1, dtype=torch.long), scores_V[None].double()).softmax(-1)[0]


def numbers(count, seed=0):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    V=st.one_of(st.integers(1, 300), st.sampled_from([2560, 2561, 5000])),
    scale=st.sampled_from([0.05, 2.0, 9.0]),
    dtype=st.sampled_from([FP32, BF16]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 50, 400]),
    top_p=st.sampled_from([1.0, 0.0, 0.05, 0.37, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    forbidden=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_what_is_drawn_is_what_transformers_leaves(V, scale, dtype, temperature, top_k, top_p, min_p, forbidden, seed):
    scores = scale * torch.randn(1, V, generator=torch.Generator().manual_seed(seed))
    scores = scores.to(dtype)
    if forbidden:
        scores[0, ::3] = -math.inf
        assume(V > 1)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    before = warped(scores[0], temperature, top_k)
    sums = before.sort().values.cumsum(-1)
    assume(top_p == 1 or ((sums - (1 - top_p)).abs() > 1e-5).all())  # not where rounding decides
    expected, count = warped(scores[0], **options), 400
    before_found = scores.clone()
    found = torch.bincount(draws(scores.expand(count, -1), numbers(count, seed), **options), minlength=V)
    assert torch.equal(scores, before_found)
    # Of equal scores at the cut as many are kept; which of them, Transformers' sort leaves open
    values = scores[0].double()
    least = values[expected > 0].min()
    assert not found[values < least].any()
    at_cut = values == least
    assert int((found[at_cut] > 0).sum()) <= int((expected[at_cut] > 0).sum())
    above = values > least
    deviation = (found[above] - count * expected[above]).abs()
    assert (deviation <= 6 * (count * expected[above]).sqrt() + 6).all()


OPTIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 0.9, "top_k": 50},
    "most of the words": {"top_k": 2000},
    "top_p": {"top_p": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.1},
    "low top_p of a flat distribution": {"temperature": 2.5, "top_p": 0.02},
    "all": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_draws_fit_the_chain(options, measured):
    """χ² of 20,000 draws over cells of at least 5 expected ones."""
    V, count = 2500, 20_000
    scores = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    expected = warped(scores[0], **options)
    found = torch.bincount(draws(scores.expand(count, -1), numbers(count), **options), minlength=V).double()
    assert not found[expected == 0].any()
    deviations = chi_squared_deviations(found, expected)
    measured["χ² of compiled sampling, deviations"] = max(
        deviations, measured.get("χ² of compiled sampling, deviations", 0.0)
    )
    assert deviations < 5


def test_ties_at_the_cut():
    """Top-k keeps all that are as likely as the k-th; top-p the first of them, as many as its share asks for."""
    scores = torch.full((1, 1000), -9.0)
    scores[0, [5, 300, 301, 700, 999]] = 0.0
    many = scores.expand(3000, -1)
    assert draws(many, numbers(3000), top_k=2).unique().tolist() == [5, 300, 301, 700, 999]
    few = torch.bincount(draws(many, numbers(3000), temperature=0.1, top_p=0.5), minlength=1000)
    assert few.nonzero()[:, 0].tolist() == [5, 300, 301] and (few[few > 0] - 1000).abs().max() < 150
    assert draws(many, numbers(3000), top_p=0.0).unique().tolist() == [5]
    scores = torch.zeros(3000, 640)
    assert draws(scores, numbers(3000), top_p=0.1).max() == 63
    counts = torch.bincount(draws(scores, numbers(3000), top_p=0.1))
    assert (counts - 3000 / 64).abs().max() < 6 * (3000 / 64) ** 0.5


def test_ends_of_what_may_be_asked():
    scores = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
    best, u = scores.argmax(-1), numbers(2000)
    for options in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-42}):
        assert torch.equal(draws(scores, u, **options), best), options
    plain = draws(scores, u)
    assert len(plain.unique()) > 300
    for options in ({"top_k": 500}, {"top_k": 10**6}, {"top_p": 1.5}):
        assert torch.equal(draws(scores, u, **options), plain), options
    assert (draws(scores[:, :1], u, top_p=0.3, top_k=1) == 0).all()
    alone = torch.full((2000, 500), -math.inf)
    alone[:, 317] = -80.0
    for options in ({}, {"top_p": 0.4}, {"top_k": 5}, {"min_p": 0.2}, {"temperature": 0.0}):
        assert (draws(alone, u, **options) == 317).all()
    ends = torch.tensor([0.0, 1.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draws(torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(3, -1), ends).tolist() == [1, 2, 2]
    assert draws(torch.zeros(0, 5), ends[:0]).tolist() == []


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_rows_that_are_not_finite_give_no_token_and_no_others_trouble(options):
    scores = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    before = draws(scores, numbers(6), **options)
    scores[1, 130], scores[2, 399], scores[3] = math.nan, math.inf, -math.inf
    scores[4, ::2] = -math.inf
    after = draws(scores, numbers(6), **options)
    assert after[1:4].tolist() == [-1] * 3 and 0 <= after[4] < 400 and after[4] % 2
    assert torch.equal(after[[0, 5]], before[[0, 5]])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_is_drawn_alone_as_among_others(threads, dtype):
    scores = (3 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    scores = torch.cat([scores, scores], dim=1)[:, 100:3100]  # rows apart
    settings = [0.0, 0.7, 1.3, 2.0] * 10, [0, 0, 30, 2000] * 10, [1.0, 0.8, 0.3, 0.95] * 10, [0.0, 0.02] * 20
    u = numbers(40).tolist()
    together = sample(scores, *settings, u)
    for count in (2, 4):
        with threads(count):
            assert sample(scores, *settings, u) == together
    for row in (0, 1, 2, 3, 38, 39):
        one = [each[row : row + 1] for each in (*settings, u)]
        assert sample(scores[row : row + 1], *one) == together[row : row + 1]
        assert sample(scores[row : row + 1].t().contiguous().t(), *one) == together[row : row + 1]


def test_wrong_arguments_are_named():
    scores, one = torch.zeros(1, 5), ([1.0], [0], [1.0], [0.0], [0.5])
    for message, given_scores, options in (
        ("scores is torch.float16", scores.half(), one),
        (r"scores is of shape \(5,\)", scores[0], one),
        (r"scores is of shape \(1, 0\)", scores[:, :0], one),
        ("top_k has 2 values for 1 rows", scores, (one[0], [0, 0], *one[2:])),
        ("temperature is -1.0", scores, ([-1.0], *one[1:])),
        ("temperature is nan", scores, ([math.nan], *one[1:])),
        ("top_p is nan", scores, (*one[:2], [math.nan], *one[3:])),
        ("min_p is 1.1", scores, (*one[:3], [1.1], one[4])),
        ("number is -0.1", scores, (*one[:4], [-0.1])),
    ):
        with pytest.raises(ValueError, match=message):
            sample(given_scores, *options)
    freed = torch.zeros(1, 5)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="scores needs 20 bytes"):
        sample(freed, *one)
    assert sample_refusal(scores) is None
    assert "fp32 and bf16" in sample_refusal(scores.double()) and "meta" in sample_refusal(scores.to("meta"))
