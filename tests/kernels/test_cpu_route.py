"""`torch.ops.transformers_dsv3.route` beside the choice that float64 makes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

FP32, BF16 = torch.float32, torch.bfloat16


def route(x, weight, bias, groups=1, top_groups=1, top_k=2, normalize=True, factor=2.5):
    return torch.ops.transformers_dsv3.route(x, weight, bias, groups, top_groups, top_k, normalize, factor)


def choice(logits, bias, groups, top_groups, top_k):
    """Experts `(T, K)` chosen in float64, and how far each token is from another choice, `(T,)`."""
    biased = logits.double().sigmoid() + bias.double()
    margin = torch.full((len(logits),), math.inf, dtype=torch.float64)

    def narrowest(values, taken):
        ordered = values.sort(-1, descending=True)[0]
        if taken == ordered.shape[-1]:
            return margin
        return torch.minimum(margin, (ordered[:, taken - 1] - ordered[:, taken]).nan_to_num(math.inf))

    if groups > 1:
        grouped = biased.unflatten(-1, (groups, -1))
        score = grouped.topk(2, dim=-1)[0].sum(-1)
        margin = narrowest(score, top_groups)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(top_groups)[1], True)
        biased = grouped.masked_fill(~kept[..., None], -math.inf).flatten(1)
    margin = narrowest(biased, top_k)
    return biased.topk(top_k)[1], margin


@settings(max_examples=50)
@given(
    dtype=st.sampled_from([FP32, BF16]),
    T=st.integers(0, 40),
    D=st.one_of(st.integers(1, 90), st.integers(2040, 2060)),
    groups=st.integers(1, 5),
    size=st.integers(2, 9),
    top_groups=st.integers(1, 5),
    top_k=st.integers(1, 12),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_choice_and_weights(dtype, T, D, groups, size, top_groups, top_k, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    E, top_groups = groups * size, min(top_groups, groups)
    top_k = min(top_k, top_groups * size)
    x = torch.randn(T, D, generator=generator).to(dtype)
    weight = (torch.randn(E, D, generator=generator) / math.sqrt(D)).to(dtype)
    bias = 0.3 * torch.randn(E, generator=generator)
    logits, mixing, expert = route(x, weight, bias, groups, top_groups, top_k, normalize, 2.5)
    assert (logits.dtype, mixing.dtype, expert.dtype) == (FP32, FP32, torch.int64)
    assert (logits.shape, mixing.shape, expert.shape) == ((T, E), (T, top_k), (T, top_k))

    size_of_sums = x.double().abs() @ weight.double().abs().T
    assert ((logits - x.double() @ weight.double().T).abs() <= 2.0**-24 * (D / 8 + 17) * size_of_sums).all()

    expected, margin = choice(logits, bias, groups, top_groups, top_k)
    clear = margin > 1e-6
    assert torch.equal(expert.sort(-1)[0][clear], expected.sort(-1)[0][clear])
    assert all(len(set(row)) == top_k for row in expert.tolist())
    scores = logits.double().sigmoid().gather(1, expert)
    expected_weight = 2.5 * (scores / scores.sum(-1, keepdim=True) if normalize else scores)
    torch.testing.assert_close(mixing.double(), expected_weight, rtol=2e-6, atol=1e-30)


def test_equal_scores_and_zeros():
    logits, mixing, expert = route(torch.zeros(3, 8), torch.zeros(6, 8), torch.zeros(6), 3, 2, 4)
    assert (logits == 0).all() and torch.allclose(mixing, torch.tensor(2.5 / 4))
    for row in expert.tolist():
        assert len(set(row)) == 4 and len({e // 2 for e in row}) == 2


def test_experts_that_a_bias_rules_out_come_last_and_none_twice():
    bias = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf])
    expert = route(torch.randn(5, 8), torch.randn(4, 8), bias, top_k=3)[2]
    assert (expert[:, 0] == 2).all()
    assert all(len(set(row)) == 3 for row in expert.tolist())


def test_scores_at_the_ends_of_the_sigmoid():
    x, weight = torch.ones(2, 1) * 1000, torch.tensor([[1.0], [-1.0], [0.5]])
    logits, mixing, expert = route(x, weight, torch.zeros(3), top_k=3)
    assert mixing.isfinite().all() and (mixing.sum(-1) - 2.5).abs().max() < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_in_its_row(groups, bad):
    x, weight, bias = torch.randn(20, 8), torch.randn(6, 8), torch.randn(6)
    before = route(x, weight, bias, groups, 1)
    x[3, 5] = bad
    logits, mixing, expert = route(x, weight, bias, groups, 1)
    assert not logits[3].isfinite().any() and (math.isinf(bad) or mixing[3].isnan().all())
    assert ((expert >= 0) & (expert < 6)).all()
    rows = torch.arange(20) != 3
    for new, old in zip((logits, mixing, expert), before):
        assert torch.equal(new[rows], old[rows])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_results_depend_neither_on_threads_nor_on_other_rows(threads, dtype):
    x, weight, bias = torch.randn(70, 300).to(dtype), torch.randn(16, 300).to(dtype), torch.randn(16)
    whole = route(x, weight, bias, 4, 2, 3)
    for count in (2, 4):
        with threads(count):
            assert all(map(torch.equal, route(x, weight, bias, 4, 2, 3), whole))
    for row in (0, 15, 16, 69):
        assert all(torch.equal(a[0], b[row]) for a, b in zip(route(x[row : row + 1], weight, bias, 4, 2, 3), whole))


X, W, B = torch.ones(3, 8), torch.ones(6, 8), torch.ones(6)
BAD = {
    "x is torch.float16": ((X.half(), W, B), {}),
    "weight is of shape (6, 7)": ((X, W[:, :7].contiguous(), B), {}),
    "weight is torch.bfloat16": ((X, W.bfloat16(), B), {}),
    "weight is not contiguous": ((X, torch.ones(8, 6).T, B), {}),
    "bias is not fp32": ((X, W, B.bfloat16()), {}),
    "bias is not fp32 of (6,)": ((X, W, B[:5]), {}),
    "groups": ((X, W, B), {"groups": 4}),
    "groups do": ((X, W, B), {"groups": 2, "top_groups": 3}),
    "groups do not": ((X, W, B), {"groups": 2, "top_groups": 1, "top_k": 4}),
    "groups do not fit": ((X, W, B), {"groups": 0}),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    arguments, options = BAD[message]
    with pytest.raises(ValueError) as error:
        route(*arguments, **options)
    assert message in str(error.value)
