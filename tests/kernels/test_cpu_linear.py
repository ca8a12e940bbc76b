"""`torch.ops.transformers_dsv3.linear` beside float64, with errors bounded by the roundings it does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

# Half a unit in the last place, as a share of the value
FP32, BF16 = 2.0**-24, 2.0**-8
ROUNDING = {torch.float32: FP32, torch.bfloat16: BF16}
LARGEST = {False: 32767, True: 127}  # of quantised activations; 8-bit ones asked for or not


def linear(x, weight, scale=None, bias=None, int8_activations=False):
    return torch.ops.transformers_dsv3.linear(x, weight, scale, bias, int8_activations)


def check(x, weight, scale=None, bias=None, int8_activations=False):
    """Compares with float64 and bounds the error of each element by the roundings on its way."""
    result = linear(x, weight, scale, bias, int8_activations)
    assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], weight.shape[0])
    K = x.shape[-1]
    exact_weight = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    exact, size = x.double() @ exact_weight.T, x.double().abs() @ exact_weight.abs().T
    # Sums go on in lanes of at least eight, then lane by lane; the last term is for scales, bias and blocks
    bound = (K / 8 + 16 + K / 2048) * FP32 * size
    if scale is not None and K:
        step = x.double().abs().amax(-1, keepdim=True) / LARGEST[int8_activations]
        bound = bound + 0.5001 * step * exact_weight.abs().sum(-1)
    if bias is not None:
        exact = exact + bias.double()
    bound = bound + ROUNDING[x.dtype] * (exact.abs() + bound) * 1.01 + 1e-37
    error = (result.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"
    return result, exact


@settings(max_examples=40)
@given(
    rows=st.one_of(st.integers(0, 20), st.integers(90, 100)),
    N=st.integers(1, 150),
    K=st.one_of(st.integers(0, 140), st.integers(2040, 2110)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weights=st.sampled_from(["float", "int8 with 16 bits", "int8 with 8 bits"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_error_is_bounded(quantize, rows, N, K, dtype, weights, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    weight, scale = torch.randn(N, K, generator=generator), None
    if weights == "float" or K == 0:
        weight = weight.to(dtype)
    else:
        weight, scale = quantize(weight)
    b = torch.randn(N, generator=generator).to(dtype) if bias else None
    check(x, weight, scale, b, weights == "int8 with 8 bits")


def test_bf16_is_no_worse_than_torchs(rms_error):
    for rows, N, K in ((1, 300, 2500), (7, 130, 515), (100, 64, 1000)):
        x, weight = torch.randn(rows, K).bfloat16(), torch.randn(N, K).bfloat16()
        exact = x.double() @ weight.double().T
        theirs = rms_error(torch.nn.functional.linear(x, weight), exact)
        assert rms_error(linear(x, weight), exact) <= 1.02 * theirs


def test_16_bit_activations_lose_less_than_bf16_weights_do(quantize, rms_error):
    x, (weight, scale) = torch.randn(5, 1000).bfloat16(), quantize(torch.randn(64, 1000))
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    rounded = x.float() @ (weight * scale[:, None]).bfloat16().float().T
    assert rms_error(linear(x, weight, scale).float(), exact) < 1.1 * rms_error(rounded.bfloat16(), exact)
    assert rms_error(linear(x.float(), weight, scale), exact) < 1e-4 * exact.square().mean().sqrt().item()


def test_largest_whole_numbers_do_not_overflow(isa):
    """Every product of a block as large as can be, of one sign."""
    x, weight = torch.ones(2, 4096), torch.full((9, 4096), 127, dtype=torch.int8)
    weight[1] = -128
    for int8_activations in (False, True):
        result = linear(x, weight, torch.ones(9), None, int8_activations)
        expected = torch.full((2, 9), 127.0 * 4096)
        expected[:, 1] = -128.0 * 4096
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            linear(-x, weight, torch.ones(9), None, int8_activations), -expected, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("int8_activations", [False, True])
def test_rows_of_zeros_and_tiny_rows(quantize, int8_activations):
    weight, scale = quantize(torch.randn(20, 40))
    weight[3], scale[4] = 0, 0
    x = torch.randn(6, 40)
    x[1], x[2], x[3] = 0, 1e-45, torch.finfo(torch.float32).tiny
    result, _ = check(x[[0, 1, 4, 5]], weight, scale, None, int8_activations)
    assert (result[1] == 0).all() and (result[:, 3:5] == 0).all()
    assert linear(x[2:4], weight, scale, None, int8_activations).abs().max() < 1e-35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float", "int8 with 16 bits", "int8 with 8 bits"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_its_row(quantize, dtype, weights, bad):
    weight, scale = torch.randn(70, 50).to(dtype), None
    if weights != "float":
        weight, scale = quantize(weight.float())
    x = torch.randn(4, 50).to(dtype)
    good = linear(x, weight, scale, None, weights == "int8 with 8 bits")
    x[2, 37] = bad
    result = linear(x, weight, scale, None, weights == "int8 with 8 bits")
    assert not result[2].isfinite().any()
    assert torch.equal(result[[0, 1, 3]], good[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float", "int8 with 16 bits", "int8 with 8 bits"])
def test_results_depend_neither_on_threads_nor_on_other_rows(quantize, threads, dtype, weights):
    weight, scale = torch.randn(203, 2100).to(dtype), None
    if weights != "float":
        weight, scale = quantize(weight.float())
    x = torch.randn(101, 2100).to(dtype)
    arguments = weight, scale, None, weights == "int8 with 8 bits"
    whole = linear(x, *arguments)
    for count in (2, 4):
        with threads(count):
            assert torch.equal(linear(x, *arguments), whole)
    for rows in (1, 2, 5, 17, 97):
        assert torch.equal(linear(x[:rows], *arguments), whole[:rows])
        assert torch.equal(linear(x[-rows:], *arguments), whole[-rows:])


def test_shapes_and_strides():
    weight = torch.randn(12, 40)
    check(torch.randn(2, 3, 40), weight)
    check(torch.randn(40), weight)
    check(torch.randn(40, 5).T, weight)
    check(torch.randn(5, 80)[:, ::2], weight)
    assert linear(torch.randn(0, 40), weight).shape == (0, 12)
    assert linear(torch.randn(3, 40), torch.randn(0, 40)).shape == (3, 0)


X, W = torch.ones(3, 8), torch.ones(4, 8)
BAD = {
    "x is torch.float64": (X.double(), W.double(), None, None),
    "x has rows of 7": (X[:, :7], W, None, None),
    "weight is torch.bfloat16": (X, W.bfloat16(), None, None),
    "weight is not contiguous": (X, torch.ones(8, 4).T, None, None),
    "weight is INT8 without a scale": (X, W.to(torch.int8), None, None),
    "weight has a scale": (X, W, torch.ones(4), None),
    "scale of weight is torch.float32 of (3,)": (X, W.to(torch.int8), torch.ones(3), None),
    "scale of weight is torch.bfloat16": (X, W.to(torch.int8), torch.ones(4).bfloat16(), None),
    "bias is torch.float32 of shape (3,)": (X, W, None, torch.ones(3)),
    "bias is torch.bfloat16": (X, W, None, torch.ones(4).bfloat16()),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError) as error:
        linear(*BAD[message])
    assert message in str(error.value)


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(quantize, int8):
    weight, scale = quantize(torch.randn(6, 8)) if int8 else (torch.randn(6, 8), None)
    torch.library.opcheck(
        torch.ops.transformers_dsv3.linear.default, (torch.randn(2, 3, 8), weight, scale, torch.randn(6), False)
    )
