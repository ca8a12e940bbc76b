"""Liger-Kernel's experts, run by Triton's interpreter where there is no GPU, against the plain loop in float64."""

import os

import numpy as np
import pytest
import torch
from packaging import version
from torch import nn

from transformers_dsv3.kernels import dispatch, experts_auto, experts_liger
from transformers_dsv3.models.dsv3.moe_dsv3 import Dsv3Experts


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter takes the bits of bf16 for whole numbers when it multiplies
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
# Read when Liger is imported: one size of tiles, since tuning measures, which the interpreter cannot
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
liger = pytest.importorskip("liger_kernel.ops")
triton = pytest.importorskip("triton")
if (
    DEVICE == "cpu"
    and version.parse(triton.__version__) < version.parse("3.9")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
):
    pytest.skip(
        "interpreters of older Tritons end no loop at a loaded number under NumPy 2.4", allow_module_level=True
    )


@pytest.fixture(scope="module", autouse=True)
def routed_once():
    """For any number of tokens Liger sorts 1,024 places, which takes the interpreter seconds: once for each choice."""
    from liger_kernel.ops import fused_moe

    compute, kept = fused_moe.compute_routing_metadata, {}

    def once(index, *arguments):
        key = (index.device, index.dtype, str(index.tolist()), arguments)
        if key not in kept:
            kept[key] = compute(index, *arguments)
        return tuple(part.clone() for part in kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_moe, "compute_routing_metadata", once)
        yield


@pytest.fixture
def experts(tiny_config):
    """Function from a dtype to eight experts with weights that matter."""

    def make(dtype=torch.float32):
        module = Dsv3Experts(tiny_config())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return module.to(DEVICE, dtype)

    return make


def routed(tokens, experts, top_k=3, seed=0, most=None):
    """Experts of each token, and mixing weights; of the first `most` experts only."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if most is not None:
        scores[:, most:] = -1
    weights, index = scores.topk(top_k)
    return index.to(DEVICE), weights.softmax(-1).to(DEVICE)


def plain(module, *arguments):
    return Dsv3Experts.forward.__wrapped__(module, *arguments)


def exact(module, hidden, index, weights):
    """Output and gradients of a sum with changing weights, in float64 on the CPU."""
    double = Dsv3Experts(module.config).double()
    double.load_state_dict({name: p.detach().double().cpu() for name, p in module.state_dict().items()})
    leaves = [hidden.detach().double().cpu().requires_grad_(), weights.detach().double().cpu().requires_grad_()]
    output = plain(double, leaves[0], index.cpu(), leaves[1])
    (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in (*leaves, double.gate_up_proj, double.down_proj))]


def results(function, module, hidden, index, weights):
    leaves = [hidden.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()]
    module.zero_grad()
    output = function(module, leaves[0], index, leaves[1])
    factors = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view_as(output)
    (output.double() * factors).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in (*leaves, module.gate_up_proj, module.down_proj))]


@pytest.mark.parametrize("load", ["even", "one expert for all", "one token", "other ranks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(experts, dtype, load, poisoned, rms_error, monkeypatch):
    torch.use_deterministic_algorithms(False)  # asked for by `poisoned`, and refused here with gradients
    monkeypatch.setattr(dispatch, "serve", lambda *a: pytest.fail("left to auto"))
    module = experts(dtype)
    tokens = 1 if load == "one token" else 9
    index, weights = routed(tokens, 8, top_k=1 if "for all" in load else 3, most=1 if "for all" in load else None)
    if load == "other ranks":
        index[index > 4] = 8
    hidden = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    found = results(experts_auto.liger_experts, module, hidden, index, weights)
    torch_own = results(plain, module, hidden, index, weights)
    for name, result, its, wanted in zip(
        ("output", "hidden", "mixing", "gate_up", "down"), found, torch_own, exact(module, hidden, index, weights)
    ):
        assert result.dtype == its.dtype, name
        size = wanted.square().mean().sqrt()
        # Gradients of mixing weights are summed in the activations' dtype
        allowed = 8 if name == "mixing" else 2
        assert rms_error(result.cpu(), wanted) <= allowed * rms_error(its.cpu(), wanted) + 1e-6 * size, name


def test_calls_that_are_left_to_auto(experts, monkeypatch):
    module = experts()
    index, weights = routed(5, 8)
    hidden = torch.randn(5, 32, device=DEVICE)
    assert experts_liger.call_refusal(module, hidden, weights) is None
    assert "activations of the weights' dtype" in experts_liger.call_refusal(module, hidden.bfloat16(), weights)
    assert "one token" in experts_liger.call_refusal(module, hidden[:0], weights[:0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert "autocast" in experts_liger.call_refusal(module, hidden, weights)
    torch.use_deterministic_algorithms(True)
    try:
        assert experts_liger.call_refusal(module, hidden, weights) is None
        assert "any order" in experts_liger.call_refusal(module, hidden, weights.requires_grad_())
    finally:
        torch.use_deterministic_algorithms(False)

    said = []
    monkeypatch.setattr(experts_auto.logger, "warning_once", said.append)
    double = module.double()
    output = experts_auto.liger_experts(double, hidden.double(), index, weights.detach().double())
    torch.testing.assert_close(output, plain(double, hidden.double(), index, weights.detach().double()))
    reason = "it takes fp32, bf16 and fp16 weights, not torch.float64."
    assert said == [f'experts_implementation="liger" does not serve a call: {reason}']


def test_modules_that_are_refused(experts, monkeypatch):
    assert experts_liger.module_refusal(experts()) is None
    assert "not torch.float64" in experts_liger.module_refusal(experts().double())
    other = experts()
    other.act_fn = nn.GELU()
    assert "SwiGLU" in experts_liger.module_refusal(other)
    other = experts()
    other.is_concatenated = False
    assert "in turns" in experts_liger.module_refusal(other)
    monkeypatch.setattr(experts_liger.importlib.metadata, "version", lambda name: "0.8.0")
    experts_liger._missing.cache_clear()
    assert 'pip install "liger-kernel>=0.8.1"`, 0.8.0 is installed' in experts_liger.module_refusal(experts())
    monkeypatch.setattr(experts_liger.importlib.util, "find_spec", lambda name: None)
    experts_liger._missing.cache_clear()
    assert experts_liger._missing() == 'needs `pip install "liger-kernel>=0.8.1"`'
    experts_liger._missing.cache_clear()


def test_chosen_by_name_for_a_whole_model(make_model, monkeypatch):
    model = make_model().to(DEVICE)
    tokens = torch.arange(1, 8, device=DEVICE)[None]
    with torch.no_grad():
        before = model(tokens).logits
        model.set_experts_implementation("liger")
        calls = []
        original = liger.LigerFusedMoEFunction.apply
        monkeypatch.setattr(liger.LigerFusedMoEFunction, "apply", lambda *a: calls.append(1) or original(*a))
        after = model(tokens).logits
    assert calls
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
