"""Linear layers by oneDNN against PyTorch's own, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import linear_onednn, matmul_cpu, selection
from transformers_dsv3.kernels.linear_onednn import linear, linear_refusal


@pytest.fixture(params=["onednn", "mm"], autouse=True)
def library(request, monkeypatch):
    """Products by oneDNN and by torch.mm, whichever this machine would take."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(matmul_cpu, "_onednn_is_faster", lambda: request.param == "onednn")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    strided=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_pytorch(shape, inputs, outputs, bias, needs, strided, seed):
    torch.manual_seed(seed)
    x = torch.randn(inputs, *shape).movedim(0, -1) if strided else torch.randn(*shape, inputs)
    leaves = [x, torch.randn(outputs, inputs)] + [torch.randn(outputs)] * bias
    for leaf, needed in zip(leaves, needs):
        leaf.requires_grad_(needed)
    y = linear(*leaves)
    double = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = F.linear(*double)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = [place for place, leaf in enumerate(leaves) if leaf.requires_grad]
    assert y.requires_grad == bool(wanted)
    if wanted:
        grad = torch.randn(outputs, *shape).movedim(0, -1) if strided else torch.ones(1).expand(y.shape)
        ours = torch.autograd.grad(y, [leaves[place] for place in wanted], grad)
        theirs = torch.autograd.grad(expected, [double[place] for place in wanted], grad.double())
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_first_and_second_derivatives_by_finite_differences():
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(2, 3, 5), (4, 5), (4,)]]
    assert torch.autograd.gradcheck(linear, leaves)
    assert torch.autograd.gradgradcheck(linear, leaves)


def test_backward_under_autocast():
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    y = linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), [x, weight])
    for ours, theirs in zip(grads, torch.autograd.grad(F.linear(x, weight).sum(), [x, weight])):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)


def test_reasons(library, request):
    x, weight = torch.randn(20, 8), torch.nn.Parameter(torch.randn(6, 8))
    faster = matmul_cpu._onednn_is_faster()
    assert linear_refusal(x, weight) == (None if faster else "is not faster than torch's own on this processor")
    assert linear_refusal(x.bfloat16(), weight) == "is for fp32 on CPUs, not torch.bfloat16 on cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_refusal(x, weight) == "does not follow autocast"
    with selection.use(linear="torch"):
        assert linear_refusal(x, weight) == "linear is served by 'torch', as chosen"
    if faster:
        assert linear_refusal(x, weight.to("meta")) == "is for fp32 on CPUs, not torch.float32 on meta"
        assert linear_refusal(x[:15], weight) == "pays from 16 rows on"
        assert linear_refusal(x[0], weight) == "pays from 16 rows on"

    class Wrapped(torch.Tensor):
        pass

    assert not faster or linear_refusal(x, weight.detach().as_subclass(Wrapped)) == "takes plain tensors, not Wrapped"
    assert "opaque" in torch.compile(lambda x: linear_onednn.linear_refusal(x, weight), backend="eager")(x)
