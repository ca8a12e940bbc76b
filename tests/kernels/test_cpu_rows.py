"""`rms_norm`, `rotate` and `project` beside float64 and the model's plain functions."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import selection
from transformers_dsv3.kernels.cpu import library, project
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("interleave", [True, False])
def test_projections_are_those_of_the_layers_one_by_one(make_model, dtype, q_lora_rank, interleave):
    """`project` beside the layers it stands for, in float64; biases and norms that are not ones."""
    model = make_model(q_lora_rank=q_lora_rank, rope_interleave=interleave, attention_bias=True).eval()
    attention = model.model.layers[0].self_attn.to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_(1.0, 0.3)
        x = torch.randn(2, 3, attention.config.hidden_size).to(dtype)
        angles = torch.rand(1, 3, attention.qk_rope_head_dim // 2).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        assert project.project_refusal(x, attention, cos) is None
        results = project.project(x, attention, cos, sin, interleave)

        def layers(attention, x, cos, sin):
            N, P, R = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
            if q_lora_rank is None:
                query = attention.q_proj(x)
            else:
                query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
            q_nope, q_rope = query.unflatten(-1, (-1, N + P)).transpose(1, 2).split([N, P], dim=-1)
            latent, k_rope = attention.kv_a_proj_with_mqa(x).split([R, P], dim=-1)
            query = torch.cat([q_nope, rotate(q_rope, cos, sin, interleave)], dim=-1)
            return query, attention.kv_a_layernorm(latent)[:, None], rotate(k_rope[:, None], cos, sin, interleave)

        plain = layers(attention, x, cos, sin)
        exact = layers(copy.deepcopy(attention).double(), x.double(), cos.double(), sin.double())
    for ours, torchs, reference in zip(results, plain, exact):
        assert ours.shape == reference.shape
        error, allowed = ((each - reference).norm() / reference.norm() for each in (ours, torchs))
        assert error <= (2e-6 if dtype == torch.float32 else 1.5 * allowed)


def test_projections_refuse_what_is_not_plain(make_model):
    attention = make_model().eval().model.layers[0].self_attn
    x, cos = torch.randn(1, 2, attention.config.hidden_size), torch.ones(1, 2, attention.qk_rope_head_dim)
    with torch.no_grad():
        handle = attention.kv_a_proj_with_mqa.register_forward_hook(lambda *_: None)
        assert "kv_a_proj_with_mqa has hooks" in project.project_refusal(x, attention, cos)
        handle.remove()
        assert project.project_refusal(x, attention, cos) is None
        attention.kv_a_layernorm = torch.nn.LayerNorm(attention.kv_lora_rank)
        assert "kv_a_layernorm is a torch.nn.modules.normalization.LayerNorm" in project.project_refusal(
            x, attention, cos
        )
    ops = torch.ops.transformers_dsv3
    weight = attention.kv_a_proj_with_mqa.weight.detach()
    with pytest.raises(ValueError, match="kv_a is of shape"):
        ops.project(
            x, None, None, None, None, 0.0, weight, None, weight[:-1], None, None, torch.ones(3), 1e-6, cos, cos, True,
            1, False,
        )  # fmt: skip


def test_training_mode_leaves_the_compiled_backend_out(make_model, monkeypatch):
    """With gradients or without: reentrant checkpointing runs each layer once in either way."""
    model = make_model().train()
    monkeypatch.setattr(library, "loaded", None)
    with torch.no_grad():
        cache = model(torch.arange(2, 12)[None], use_cache=True).past_key_values
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
