"""`rms_norm` and `rotate` of `torch.ops.transformers_dsv3` beside float64 and the model's plain functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import selection
from transformers_dsv3.models.dsv3.attention_dsv3 import rotate


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
dtypes = st.sampled_from(list(ROUNDING))


def rms_norm(x, weight, eps=1e-6):
    return torch.ops.transformers_dsv3.rms_norm(x, weight, eps)


@settings(max_examples=50)
@given(
    dtype=dtypes,
    shape=st.lists(st.integers(0, 20), min_size=0, max_size=3),
    n=st.one_of(st.integers(1, 100), st.integers(2040, 2060)),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rms_norm(dtype, shape, n, size, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(*shape, n + 5, generator=generator).to(dtype)
    x = x[..., 2 : 2 + n] if strided else x[..., :n].contiguous()
    weight = torch.randn(n, generator=generator).to(dtype)
    result = rms_norm(x, weight)
    assert result.shape == x.shape and result.dtype == dtype and result.is_contiguous()
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    bound = (2.0**-24 * (n / 32 + 40) + ROUNDING[dtype]) * exact.abs() + 1e-37
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rms_norm_of_one_row_is_that_among_others(threads, dtype):
    x, weight = torch.randn(1, 70, 200).to(dtype)[..., 30:], torch.randn(170).to(dtype)
    whole = rms_norm(x, weight)
    for count in (2, 4):
        with threads(count):
            assert torch.equal(rms_norm(x, weight), whole)
    for row in (0, 16, 69):
        assert torch.equal(rms_norm(x[:, row : row + 1], weight), whole[:, row : row + 1])
        assert torch.equal(rms_norm(x[0, row], weight), whole[0, row])
    x[0, 5, 3] = math.nan
    assert rms_norm(x, weight)[0, 5].isnan().all()


@settings(max_examples=50)
@given(
    dtype=dtypes,
    B=st.integers(0, 3),
    H=st.integers(1, 5),
    Q=st.integers(0, 30),
    half=st.one_of(st.integers(1, 40), st.just(512)),
    interleave=st.booleans(),
    batched=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rotate(dtype, B, H, Q, half, interleave, batched, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    P = 2 * half
    x = torch.randn(B, Q, H, P + 6, generator=generator).to(dtype).transpose(1, 2)
    x = x[..., 6:] if strided else x[..., :P].contiguous()
    angle = 9 * torch.rand(B if batched else 1, Q, half, generator=generator)
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    result = torch.ops.transformers_dsv3.rotate(x, cos, sin, interleave)
    assert result.dtype == dtype and result.shape == x.shape and result.is_contiguous()
    with selection.use(attention="torch"):
        exact = rotate(x.double(), cos.double(), sin.double(), interleave)
        plain = rotate(x, cos, sin, interleave)
    # Both products are as large as this at most
    size = x.double().unfold(-1, P, 1).abs().amax(-1)
    assert ((result.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 3 * 2.0**-24 * size + 1e-37).all()
    if dtype == torch.bfloat16 and result.numel():
        assert (result - exact).square().sum() <= (plain - exact).square().sum() + 1e-30


def test_wrong_arguments_are_named():
    x, cos = torch.ones(2, 3, 4, 8), torch.ones(2, 4, 8)
    for message, arguments in {
        "x is torch.float64": (x.double(), cos, cos),
        "x has 7 dimensions to rotate": (x[..., :7], cos[..., :7], cos[..., :7]),
        "x has 1026 dimensions": (torch.ones(1, 1, 1, 1026), torch.ones(1, 1, 1026), torch.ones(1, 1, 1026)),
        "cos is torch.float32 of shape (2, 3, 8)": (x, cos[:, :3], cos),
        "sin is torch.bfloat16": (x, cos, cos.bfloat16()),
    }.items():
        with pytest.raises(ValueError) as error:
            torch.ops.transformers_dsv3.rotate(*arguments, False)
        assert message in str(error.value)
    for message, arguments in {
        "x is torch.float16": (x.half(), torch.ones(8)),
        "weight is of shape (7,)": (x, torch.ones(7)),
        "weight is torch.bfloat16": (x, torch.ones(8).bfloat16()),
        "weight is not contiguous": (x, torch.ones(16)[::2]),
    }.items():
        with pytest.raises(ValueError) as error:
            rms_norm(*arguments)
        assert message in str(error.value)


def test_opcheck():
    ops = torch.ops.transformers_dsv3
    torch.library.opcheck(ops.rms_norm.default, (torch.randn(1, 3, 8), torch.randn(8), 1e-6))
    angles = torch.randn(1, 4, 8)
    torch.library.opcheck(ops.rotate.default, (torch.randn(2, 3, 4, 8), angles, angles, True))
