"""GPTQ beside the textbook's algorithm in float64, rounding to nearest and what is known in closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.compression.gptq import (
    DAMPING,
    gptq,
    group_scales,
    inverse_factor,
    limits,
    round_to_nearest,
)


def correlated(width, tokens, seed=0):
    """Inputs of which few directions hold most, as those of real layers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    sizes = torch.rand(width // 32, generator=generator).repeat_interleave(32) + 0.1
    return torch.randn(tokens, width, generator=generator) @ mixing * sizes


def weights(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 100)) * 0.05


def loss(weight, rounded, hessian):
    error = (weight - rounded.dequantized()).double()
    return ((error @ hessian.double()) * error).sum().item()


def textbook(weight, hessian, bits):
    """Section 2 of the paper in float64: after each column, the inverse of what is left of the Hessian anew.

    Groups of columns are taken in the order of their inputs' sizes.
    """
    groups = hessian.diagonal().view(-1, 32).sum(1).argsort(descending=True)
    order = torch.cat([torch.arange(32 * group, 32 * group + 32) for group in groups.tolist()])
    weight, hessian = weight[:, order], hessian[order][:, order]
    lowest, highest = limits(bits)
    left, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    whole = torch.empty(weight.shape, dtype=torch.int8)
    scales = []
    for i in range(weight.shape[1]):
        if i % 32 == 0:
            scales.append(group_scales(left[:, i : i + 32].T.float(), bits).double())
        inverse = torch.linalg.inv(hessian[i:, i:])
        whole[:, i] = (left[:, i] / scales[-1]).round().clamp(lowest, highest)
        error = left[:, i] - whole[:, i] * scales[-1]
        left[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return whole[:, order.argsort()], torch.stack(scales, dim=1).float()[:, groups.argsort()]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_the_textbooks_algorithm(bits):
    x = correlated(160, 1000)  # more than one block of columns, and a part of one
    hessian, weight = x.T @ x, weights(24, 160)
    rounded = gptq(weight, inverse_factor(hessian), bits)
    whole, scale = textbook(weight, hessian, bits)
    # What lies in the middle of two steps may fall to either side in another precision, and the row's rest with it
    first = int(x.square().sum(0).view(-1, 32).sum(1).argmax())
    assert torch.equal(rounded.scale[:, first], scale[:, first])
    same_rows = (rounded.whole == whole).all(dim=1)
    assert same_rows.float().mean() > (0.4 if bits == 8 else 0.8)
    expected = type(rounded)(whole, scale)
    assert loss(weight, rounded, hessian) == pytest.approx(loss(weight, expected, hessian), rel=0.02)


@settings(deadline=None, max_examples=20)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 9), groups=st.integers(1, 6), seed=st.integers(0, 999))
def test_with_nothing_to_choose_by_it_rounds_to_nearest(bits, rows, groups, seed):
    weight = weights(rows, 32 * groups, seed)
    expected = round_to_nearest(weight, bits)
    rounded = gptq(weight, inverse_factor(7 * torch.eye(32 * groups)), bits)
    assert torch.equal(rounded.whole, expected.whole) and torch.equal(rounded.scale, expected.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [20, 2000])
def test_loses_less_than_rounding_to_nearest(bits, tokens, measured):
    shares = []
    for seed in range(4):
        x = correlated(128, tokens, seed)
        hessian, weight = x.T @ x, weights(48, 128, seed)
        nearest = loss(weight, round_to_nearest(weight, bits), hessian)
        shares.append(loss(weight, gptq(weight, inverse_factor(hessian), bits), hessian) / nearest)
    measured[f"GPTQ, {bits} bits, {tokens} tokens: loss beside rounding to nearest, at most"] = max(shares)
    assert max(shares) < 0.7


def test_the_factor_is_that_of_the_damped_inverse():
    x = correlated(96, 40)  # fewer tokens than inputs: without damping there is no inverse
    hessian = x.T @ x
    kept = hessian.clone()
    order, upper = inverse_factor(hessian)
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(96)
    # Groups as a whole, the largest inputs first
    sums = hessian.diagonal().view(3, 32).sum(1)
    assert order[::32].tolist() == (32 * sums.argsort(descending=True)).tolist()
    assert torch.equal(order % 32, torch.arange(32).repeat(3))
    damped = damped[order][:, order]
    upper = upper.double()
    assert torch.equal(hessian, kept) and torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(96).double(), atol=1e-4, rtol=0)


def test_there_is_no_factor_of_nothing_and_of_what_is_not_finite():
    assert inverse_factor(torch.zeros(32, 32)) is None
    assert inverse_factor(torch.full((32, 32), torch.nan)) is None
    assert inverse_factor(torch.full((32, 32), torch.inf)) is None


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    magnitude=st.floats(-7, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_scales_are_held_by_bf16_and_fp16(bits, magnitude, dtype, seed):
    weight = (weights(3, 64, seed) * 10**magnitude).to(dtype)
    whole, scale = round_to_nearest(weight, bits)
    assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(scale, scale.half().float())
    lowest, highest = limits(bits)
    assert lowest <= whole.min() and whole.max() <= highest and whole.dtype == torch.int8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_scale_is_no_worse_than_that_of_the_largest(bits):
    weight = weights(50, 64)
    lowest, highest = limits(bits)
    columns = weight.unflatten(-1, (-1, 32))
    scale = columns.abs().amax(-1, keepdim=True) / highest
    plain = ((columns / scale).round().clamp(lowest, highest) * scale - columns).square().sum()
    assert (round_to_nearest(weight, bits).dequantized() - weight).square().sum() < plain * 1.02


def test_zeros_stay_zeros():
    weight = torch.zeros(2, 64)
    weight[0, 3] = 1.0
    for rounded in (round_to_nearest(weight, 3), gptq(weight, inverse_factor(torch.eye(64)), 3)):
        assert rounded.dequantized()[:, 32:].eq(0).all() and rounded.dequantized()[1].eq(0).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e8])
def test_weights_that_no_scale_holds_are_refused(wrong):
    weight = weights(2, 64)
    weight[1, 40] = wrong
    for function in (lambda: round_to_nearest(weight, 4), lambda: gptq(weight, inverse_factor(torch.eye(64)), 4)):
        with pytest.raises(ValueError, match="the largest weight is"):
            function()
