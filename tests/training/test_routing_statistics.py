"""Routing statistics against closed forms and the symmetries that they must have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_dsv3.training.routing_statistics import routing_statistics


LOADS = st.integers(1, 12).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 10_000), min_size=experts, max_size=experts).filter(any), min_size=1, max_size=4
    )
)


def figures(loads):
    return vars(routing_statistics(torch.tensor(loads)))


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], equal_nan=True, msg=name, **tolerance)


@given(experts=st.integers(1, 256), load=st.integers(1, 10**9))
def test_equal_loads(experts, load):
    result = figures([[load] * experts])
    assert result["utilisation"].item() == result["above_half_fair"].item() == 1
    assert result["max_violation"].item() == result["dead_experts"].item() == 0
    assert result["load_entropy"].item() == pytest.approx(1)


@given(experts=st.integers(2, 256), load=st.integers(1, 10**9), data=st.data())
def test_one_expert_takes_everything(experts, load, data):
    loads = [0] * experts
    loads[data.draw(st.integers(0, experts - 1))] = load
    result = figures([loads])
    assert result["utilisation"].item() == pytest.approx(1 / experts)
    assert result["max_violation"].item() == pytest.approx(experts - 1)
    assert result["load_entropy"].item() == 0
    assert result["dead_experts"].item() == experts - 1
    assert result["above_half_fair"].item() == 1 / experts


@given(LOADS)
def test_against_plain_sums(loads):
    result = figures(loads)
    for row, counts in enumerate(loads):
        mean, largest = sum(counts) / len(counts), max(counts)
        shares = [count / sum(counts) for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares)
        assert result["utilisation"][row].item() == pytest.approx(mean / largest)
        assert result["max_violation"][row].item() == pytest.approx((largest - mean) / mean)
        expected = entropy / math.log(len(counts)) if len(counts) > 1 else 1
        assert result["load_entropy"][row].item() == pytest.approx(expected, abs=1e-12)
        assert result["dead_experts"][row].item() == counts.count(0)
        assert result["above_half_fair"][row].item() == sum(2 * c > mean for c in counts) / len(counts)


@given(LOADS)
def test_utilisation_and_max_violation_are_one_figure(loads):
    result = figures(loads)
    torch.testing.assert_close(result["utilisation"], 1 / (1 + result["max_violation"]))


@given(LOADS, st.sampled_from([2, 4, 1024]))
def test_only_shares_matter(loads, factor):
    assert_same(figures(loads), figures([[factor * count for count in counts] for counts in loads]))


@given(LOADS, st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(loads, random):
    assert_same(figures(loads), figures([random.sample(counts, len(counts)) for counts in loads]))


@given(LOADS, st.randoms(use_true_random=False))
def test_layers_do_not_see_each_other(loads, random):
    order = random.sample(range(len(loads)), len(loads))
    one, other = figures(loads), figures([loads[row] for row in order])
    assert_same({name: values[order] for name, values in one.items()}, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_any_dtype(dtype):
    assert_same(figures([[1, 2, 0, 5]]), vars(routing_statistics(torch.tensor([[1, 2, 0, 5]], dtype=dtype))))


def test_a_layer_without_tokens_is_unknown_and_left_out_of_the_mean():
    statistics = routing_statistics(torch.tensor([[0, 0], [3, 1], [4, 0]]))
    for values in vars(statistics).values():
        assert values.isnan().tolist() == [True, False, False]
    mean = statistics.mean()
    assert mean["utilisation"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean["dead_experts"] == 1
    alone = routing_statistics(torch.tensor([[0], [7]]))
    assert alone.load_entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(4,), (2, 0), (1, 2, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must be \\(layers, experts\\)"):
        routing_statistics(torch.ones(shape))
