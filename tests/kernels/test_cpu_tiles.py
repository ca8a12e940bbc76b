"""Products on matrix units where there are more rows than they take at once, and beside another library's in a thread.

Few rows are in `test_cpu_linear.py` and `test_cpu_mixture.py`, for every instruction set.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.kernels import test_cpu_attention, test_cpu_mixture
from transformers_dsv3.kernels import backends, dispatch
from transformers_dsv3.kernels.cpu import library


@pytest.fixture(autouse=True)
def tiles(poisoned):
    """Skips where the processor or the library has none."""
    if library.unavailable is not None or library.instruction_set() != "amx":
        pytest.skip("needs a processor with AMX")


def linear(x, weight, scale=None):
    return torch.ops.transformers_dsv3.linear(x, weight, scale, None, False)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_many_rows(quantize, stands_for, threads, bits):
    """Beside float64, and each row as by itself; rows past whole tiles, and weights past whole steps."""
    K = 1100 if bits is None else 1120
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(557, K, generator=generator).bfloat16()
    weight, scale = torch.randn(83, K, generator=generator).bfloat16(), None
    exact = weight.double()
    if bits is not None:
        weight, scale = quantize(weight, bits)
        exact = stands_for(weight, scale).bfloat16().double()
    y = linear(x, weight, scale)
    size = x.double().abs() @ exact.abs().T
    bound = (K / 32 + 32) * 2.0**-24 * size
    expected = x.double() @ exact.T
    assert ((y.double() - expected).abs() <= bound + 2.0**-8 * (expected.abs() + bound)).all()
    with threads(3):
        assert torch.equal(linear(x, weight, scale), y)
    for rows in (slice(0, 1), slice(255, 258), slice(540, 557)):
        assert torch.equal(linear(x[rows], weight, scale), y[rows])


@pytest.mark.parametrize("kind", ["bf16", "q8", "q4"])
@pytest.mark.parametrize("loads", ["one expert", "uneven"])
def test_experts_of_many_rows(quantize, stands_for, threads, kind, loads):
    T, E = 700, 5
    generator = torch.Generator().manual_seed(1)
    expert = (torch.rand(T, 2, generator=generator) ** (4 if loads == "uneven" else 40) * E).long()
    case = test_cpu_mixture.Case(quantize, stands_for, kind, torch.bfloat16, T, 96, E, 40, 2, 70, expert)
    result = case.check()
    with threads(3):
        assert torch.equal(case.run(), result)
    assert torch.equal(case.run(slice(690, 700)), result[690:])


def test_torchs_own_products_in_the_same_thread():
    """Both say to the processor what tiles they use."""
    x, weight = torch.randn(40, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    ours, theirs = linear(x, weight), F.linear(x, weight)
    for rows in (1, 7, 40, 33, 16):
        assert torch.equal(linear(x[:rows], weight), ours[:rows])
        torch.testing.assert_close(F.linear(x[:rows], weight), theirs[:rows], rtol=0.02, atol=0.1)
    assert torch.equal(F.linear(x, weight), theirs)


@torch.no_grad()
def test_any_number_of_rows_is_taken():
    weight, layer = torch.randn(512, 512).bfloat16(), torch.nn.Identity().eval()
    for rows in (1, 100, 5000):
        x = torch.randn(rows, 512).bfloat16()
        asked = (x, weight, None, None, False)
        assert dispatch.refusal_of_call(backends.LINEAR, backends.LINEAR["cpu"], layer, *asked) is None


def test_what_is_not_finite_stays_in_its_row_and_column():
    x, weight = torch.randn(300, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    good = linear(x, weight)
    x[270, 95], weight[33, 0] = math.inf, math.nan
    bad = linear(x, weight)
    assert bad[:, 33].isnan().all() and not bad[270].isfinite().any()
    rows, columns = [i for i in range(300) if i != 270], [j for j in range(40) if j != 33]
    assert torch.equal(bad[rows][:, columns], good[rows][:, columns])


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("Q", [24, 33, 150])
@pytest.mark.parametrize("strided", [False, True])
def test_attention_of_many_queries(threads, mask, Q, strided):
    case = test_cpu_attention.Case(
        torch.bfloat16, B=2, H=2, Q=Q, S=Q + 131, N=64, P=32, V=48, strided=strided, seed=Q
    ).make_mask(mask, dead_rows=True)
    case.first_query = 131
    result = case.expanded()
    test_cpu_attention.assert_close(result, case.exact_expanded(), torch.bfloat16)
    with threads(3):
        assert torch.equal(case.expanded(), result)
    case.q_rope[1, 1, 20, 0] = math.nan
    other = case.expanded()
    assert not other[1, 20, 1].isfinite().any()
    other[1, 20, 1] = result[1, 20, 1]
    assert torch.equal(other, result)
