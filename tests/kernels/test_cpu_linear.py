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
# Bits of the weights, None for floats, and whether activations are rounded to 8
KINDS = {
    "float": (None, False),
    "8 bits": (8, False),
    "8 bits, rounded activations": (8, True),
    "4 bits": (4, False),
    "4 bits, rounded activations": (4, True),
}


def linear(x, weight, scale=None, bias=None, int8_activations=False):
    return torch.ops.transformers_dsv3.linear(x, weight, scale, bias, int8_activations)


def group_sums(x):
    return x.unflatten(-1, (-1, 32)).sum(-1)


@pytest.fixture(scope="session")
def check(stands_for):
    """Compares with float64 and bounds the error of each element by the roundings on its way."""

    def compare(x, weight, scale=None, bias=None, int8_activations=False):
        result = linear(x, weight, scale, bias, int8_activations)
        assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], weight.shape[0])
        K = x.shape[-1]
        exact_weight = weight.double() if scale is None else stands_for(weight, scale)
        exact, size = x.double() @ exact_weight.T, x.double().abs() @ exact_weight.abs().T
        # Sums go on in lanes of at least eight, then lane by lane; the last term is for scales, bias and blocks
        bound = (K / 8 + 16 + K / 512) * FP32 * size
        if scale is not None and int8_activations and K:
            step = x.double().abs().unflatten(-1, (-1, 32)).amax(-1) / 127
            bound = bound + 0.5001 * step @ group_sums(exact_weight.abs()).T
        elif scale is not None:
            bound = bound + size * (BF16 if x.dtype == torch.bfloat16 else 0)  # what weights are rounded to
        if bias is not None:
            exact = exact + bias.double()
        bound = bound + ROUNDING[x.dtype] * (exact.abs() + bound) * 1.01 + 1e-37
        error = (result.double() - exact).abs()
        assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"
        return result, exact

    return compare


@settings(max_examples=60)
@given(
    rows=st.one_of(st.integers(0, 20), st.integers(90, 100)),
    N=st.integers(1, 150),
    K=st.one_of(st.integers(0, 140), st.integers(2040, 2110), st.integers(4090, 4200)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(list(KINDS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_error_is_bounded(quantize, check, rows, N, K, dtype, kind, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    bits, rounded = KINDS[kind]
    K = K if bits is None else K // 32 * 32
    x = torch.randn(rows, K, generator=generator).to(dtype)
    weight, scale = torch.randn(N, K, generator=generator), None
    if bits is None:
        weight = weight.to(dtype)
    else:
        weight, scale = quantize(weight * torch.rand(N, K, generator=generator), bits)
    b = torch.randn(N, generator=generator).to(dtype) if bias else None
    check(x, weight, scale, b, rounded)


def test_bf16_is_no_worse_than_torchs(rms_error):
    for rows, N, K in ((1, 300, 2500), (7, 130, 515), (100, 64, 1000)):
        x, weight = torch.randn(rows, K).bfloat16(), torch.randn(N, K).bfloat16()
        exact = x.double() @ weight.double().T
        theirs = rms_error(torch.nn.functional.linear(x, weight), exact)
        assert rms_error(linear(x, weight), exact) <= 1.02 * theirs


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_activations_meet_what_the_weights_stand_for(quantize, stands_for, rms_error, bits):
    x, (weight, scale) = torch.randn(5, 1024), quantize(torch.randn(64, 1024), bits)
    exact = x.double() @ stands_for(weight, scale).T
    assert rms_error(linear(x, weight, scale), exact) < 1e-6 * exact.square().mean().sqrt().item()
    rounded = x.bfloat16().float() @ stands_for(weight, scale).bfloat16().float().T
    ours = linear(x.bfloat16(), weight, scale)
    assert (ours.float() - rounded).abs().max() <= 0.51 * 2**-7 * rounded.abs().max()


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("rounded", [False, True])
def test_largest_whole_numbers_do_not_overflow(isa, rows, rounded):
    """Every product as large as can be, of one sign."""
    ones = torch.ones(9, 4096 // 32).half()
    eight = torch.full((9, 4096), 127, dtype=torch.int8)
    eight[1] = -128
    four = torch.full((9, 2048), 15 + 16 * 15, dtype=torch.uint8)
    four[1] = 0
    for weight, largest, smallest in ((eight, 127.0, -128.0), (four, 7.0, -8.0)):
        expected = torch.full((rows, 9), largest * 4096)
        expected[:, 1] = smallest * 4096
        for sign in (1, -1):
            x = torch.full((rows, 4096), float(sign))
            torch.testing.assert_close(linear(x, weight, ones, None, rounded), sign * expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_scale_of_half_precision(stands_for, bits):
    """Subnormal ones too, and of either sign."""
    scale = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    scale = scale[scale.isfinite()][:, None]
    weight = torch.ones(len(scale), 32, dtype=torch.int8) if bits == 8 else torch.full((len(scale), 16), 0x99).byte()
    x = torch.zeros(5, 32)
    x[:, 3] = 1
    for rounded in (False, True):
        for rows in (x, x[:1]):
            expected = scale.float().T.expand(len(rows), -1)
            torch.testing.assert_close(linear(rows, weight, scale, None, rounded), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_tiny_rows(quantize, check, bits, rounded):
    weight, scale = quantize(torch.randn(20, 64), bits)
    weight[3] = {8: 0, 4: 0x88}[bits]
    scale[4] = 0
    x = torch.randn(6, 64)
    x[1], x[2], x[3] = 0, 1e-45, torch.finfo(torch.float32).tiny
    result, _ = check(x[[0, 1, 4, 5]], weight, scale, None, rounded)
    assert (result[1] == 0).all() and (result[:, 3:5] == 0).all()
    assert linear(x[2:4], weight, scale, None, rounded).abs().max() < 1e-35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [3, 14])
def test_what_is_not_finite_stays_so_in_its_row(quantize, dtype, kind, bad, rows):
    bits, rounded = KINDS[kind]
    weight, scale = torch.randn(70, 64).to(dtype), None
    if bits:
        weight, scale = quantize(weight.float() + 1, bits)
    x = torch.randn(rows, 64).to(dtype)
    good = linear(x, weight, scale, None, rounded)
    x[2, 37] = bad
    result = linear(x, weight, scale, None, rounded)
    assert not result[2].isfinite().any()
    others = [i for i in range(rows) if i != 2]
    assert torch.equal(result[others], good[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_results_depend_neither_on_threads_nor_on_other_rows(quantize, threads, dtype, kind):
    bits, rounded = KINDS[kind]
    K = 2100 if bits is None else 4192
    weight, scale = torch.randn(203, K).to(dtype), None
    if bits:
        weight, scale = quantize(weight.float(), bits)
    x = torch.randn(101, K).to(dtype)
    arguments = weight, scale, None, rounded
    whole = linear(x, *arguments)
    for count in (2, 4):
        with threads(count):
            assert torch.equal(linear(x, *arguments), whole)
    for rows in (1, 2, 3, 4, 5, 17, 97):
        assert torch.equal(linear(x[:rows], *arguments), whole[:rows])
        assert torch.equal(linear(x[-rows:], *arguments), whole[-rows:])


def test_shapes_and_strides(check):
    weight = torch.randn(12, 40)
    check(torch.randn(2, 3, 40), weight)
    check(torch.randn(40), weight)
    check(torch.randn(40, 5).T, weight)
    check(torch.randn(5, 80)[:, ::2], weight)
    assert linear(torch.randn(0, 40), weight).shape == (0, 12)
    assert linear(torch.randn(3, 40), torch.randn(0, 40)).shape == (3, 0)


X, W = torch.ones(3, 64), torch.ones(4, 64)
Q8, Q4, SCALE = W.to(torch.int8), torch.ones(4, 32).byte(), torch.ones(4, 2).half()
BAD = {
    "x is torch.float64": (X.double(), W.double(), None, None),
    "x has rows of 7": (X[:, :7], W, None, None),
    "x has rows of 64, weight of 32": (X, Q4[:, :16].contiguous(), SCALE, None),
    "weight is torch.bfloat16": (X, W.bfloat16(), None, None),
    "weight is not contiguous": (X, torch.ones(64, 4).T, None, None),
    "weight is quantised without a scale": (X, Q8, None, None),
    "weight is quantised in rows of 40, not a multiple of 32": (X[:, :40], Q8[:, :40].contiguous(), SCALE, None),
    "weight has a scale": (X, W, SCALE, None),
    "scale of weight is torch.float16 of (3, 2)": (X, Q8, SCALE[:3], None),
    "scale of weight is torch.float16 of (4,)": (X, Q4, SCALE[:, 0].contiguous(), None),
    "scale of weight is torch.bfloat16": (X, Q8, SCALE.bfloat16(), None),
    "bias is torch.float32 of shape (3,)": (X, W, None, torch.ones(3)),
    "bias is torch.bfloat16": (X, W, None, torch.ones(4).bfloat16()),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError) as error:
        linear(*BAD[message])
    assert message in str(error.value)
