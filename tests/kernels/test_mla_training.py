"""Expanded attention for training on a CPU against plain attention, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import matmul_cpu, mla_training, selection
from transformers_dsv3.kernels.mla_training import expanded_attention, expanded_refusal


def plain(q_nope, q_rope, kv, k_rope, mask, scaling):
    """PyTorch's attention on keys and values of every head."""
    heads, nope = q_nope.shape[1], q_nope.shape[-1]
    k_nope, value = kv.transpose(1, 2).split([nope, kv.shape[-1] - nope], dim=-1)
    key = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1, -1)], dim=-1)
    query = torch.cat([q_nope, q_rope], dim=-1)
    output = F.scaled_dot_product_attention(
        query, key, F.pad(value, [0, key.shape[-1] - value.shape[-1]]), mask, is_causal=mask is None, scale=scaling
    )
    return output[..., : value.shape[-1]].transpose(1, 2)


def make_inputs(batch, heads, queries, keys, nope, rope, value, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = [(batch, queries, heads, nope + rope), (batch, keys, heads, nope + value), (batch, keys, rope)]
    query, kv, k_rope = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    q_nope, q_rope = query.transpose(1, 2).split([nope, rope], dim=-1)
    return q_nope, q_rope.contiguous(), kv, k_rope


def run(function, inputs, mask, scaling=0.3, grad=None):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves, mask, scaling)
    grad = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape) if grad is None else grad
    return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


@pytest.fixture(params=[3, 256], ids=["blocks of 3", "blocks of 256"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(mla_training, "QUERIES", request.param)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 11),
    keys=st.integers(0, 5),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    mask=st.sampled_from(["causal", "boolean", "additive", "per head"]),
    seed=st.integers(0, 100),
)
@pytest.mark.usefixtures("blocks")
def test_equals_pytorch(batch, heads, queries, keys, widths, mask, seed):
    nope, rope, value = widths
    value = min(value, nope + rope)
    keys = queries + (0 if mask == "causal" else keys)
    inputs = make_inputs(batch, heads, queries, keys, nope, rope, value, seed)
    given_mask = None
    if mask != "causal":
        given_mask = torch.rand(batch, heads if mask == "per head" else 1, queries, keys) < 0.7
        given_mask[0, :, 0] = False  # a query that may attend nothing
        if mask == "additive":
            given_mask = torch.randn(given_mask.shape, dtype=torch.float64).masked_fill(~given_mask, -torch.inf)
    for ours, theirs in zip(run(expanded_attention, inputs, given_mask), run(plain, inputs, given_mask)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("blocks")
def test_gradients_by_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 2, 4, 4, 3, 2, 4)]
    assert torch.autograd.gradcheck(lambda *leaves: expanded_attention(*leaves, None, 0.5), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_errors_are_no_larger_than_pytorchs(dtype, masked, measured):
    inputs = make_inputs(2, 2, 300, 300, 32, 16, 24, dtype=dtype)
    grad = torch.randn(2, 300, 2, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = None
    if masked:
        mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
        mask[1, :, :, :40] = False
    exact = run(plain, [tensor.double() for tensor in inputs], mask, 0.15, grad.double())
    theirs = run(plain, inputs, mask, 0.15, grad)
    ours = run(expanded_attention, inputs, mask, 0.15, grad)
    for name, value, peer, reference in zip(["output", "q_nope", "q_rope", "kv", "k_rope"], ours, theirs, exact):
        assert value.dtype == dtype
        ratio = ((value - reference).norm() / (peer - reference).norm()).item()
        what = f"attention for training, {dtype} error over PyTorch's, {name}"
        measured[what] = max(ratio, measured.get(what, 0.0))
        assert ratio <= 1.25, name


def test_reasons(monkeypatch):
    monkeypatch.setattr(matmul_cpu, "_onednn_is_faster", lambda: True)
    q_nope, _, kv, k_rope = make_inputs(1, 2, 4, 4, 4, 2, 4, dtype=torch.float32)
    inputs = [tensor.detach().requires_grad_() for tensor in (q_nope, kv, k_rope)]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert expanded_refusal(*inputs, None, 0.0) is None
    assert expanded_refusal(*inputs, mask, 0.0) is None
    assert expanded_refusal(*inputs, None, 0.1) == "has no dropout"
    with torch.no_grad():
        assert expanded_refusal(*inputs, None, 0.0) == "is for training"
    with torch.autocast("cpu", torch.bfloat16):
        assert expanded_refusal(*inputs, None, 0.0) == "does not follow autocast"
    with selection.use(attention="torch"):
        assert expanded_refusal(*inputs, None, 0.0) == "attention is served by 'torch', as chosen"
    assert "takes masks" in expanded_refusal(*inputs, mask[0, 0], 0.0)
    assert "gradients of masks" in expanded_refusal(*inputs, mask.float().requires_grad_(), 0.0)
    assert "needs a mask" in expanded_refusal(inputs[0][:, :, :2], *inputs[1:], None, 0.0)
    assert "one dtype" in expanded_refusal(*inputs[:2], inputs[2].bfloat16(), None, 0.0)
    assert "torch.float64" in expanded_refusal(*(tensor.double() for tensor in inputs), None, 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert "8 threads" in expanded_refusal(*inputs, None, 0.0)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_model_trains_by_it(make_model, padding, monkeypatch):
    """Loss and gradients as with PyTorch's own attention and linear layers."""
    monkeypatch.setattr(matmul_cpu, "_onednn_is_faster", lambda: True)
    model = make_model(attn_implementation="sdpa", num_nextn_predict_layers=0).train()
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padding is not None:
        mask[1, :5] = 0
        mask = mask.flip(1) if padding == "right" else mask
    labels = tokens.masked_fill(mask == 0, -100)
    calls = []
    monkeypatch.setattr(mla_training._ExpandedAttention, "apply", count(mla_training._ExpandedAttention.apply, calls))

    def gradients():
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ours = gradients()
    assert len(calls) == model.config.num_hidden_layers
    with selection.use(attention="torch", linear="torch"):
        theirs = gradients()
    assert len(calls) == model.config.num_hidden_layers
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def count(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted
