"""Low-rank experts beside the plain loop, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import backends, dispatch, experts_lora
from transformers_dsv3.kernels.experts_lora import LowRank, plain_low_rank_experts
from transformers_dsv3.models.dsv3.moe_dsv3 import Dsv3Experts


def low_rank_experts(module, hidden, *arguments):
    """By whichever backend takes it."""
    return dispatch.serve(backends.ADAPTED, module, hidden, module, *arguments)


def problem(tiny_config, tokens, experts, top_k, rank, dtype=torch.float64, elsewhere=False, seed=0):
    """Experts, their inputs, and adapters `(gate_up, down)`; some experts have no token, some pairs no expert here."""
    torch.manual_seed(seed)
    config = tiny_config(n_routed_experts=experts, num_experts_per_tok=top_k, n_group=1, topk_group=1)
    module = Dsv3Experts(config).to(dtype).requires_grad_(False)
    for weight in module.parameters():
        weight.normal_(0, 0.3)
    scores = torch.rand(tokens, experts)
    scores[:, ::3] -= 1  # hardly ever chosen
    index = scores.topk(top_k)[1]
    if elsewhere and tokens:
        index[::2, 0] = experts
    hidden = torch.randn(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, top_k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    adapters = []
    for stack, extra in ((module.gate_up_proj, 0), (module.down_proj, 2)):
        _, out, inside = stack.shape
        a = torch.randn(experts, rank + extra, inside, dtype=dtype) * 0.3
        b = torch.randn(experts, out, rank + extra, dtype=dtype) * 0.3
        adapters.append(LowRank(a.requires_grad_(), b.requires_grad_()))
    return module, (hidden, index, weights.requires_grad_()), adapters


def results(function, module, inputs, adapters, probe):
    hidden, _, weights = inputs
    leaves = [hidden, weights, *(tensor for adapter in adapters if adapter is not None for tensor in adapter)]
    out = function(module, *inputs, *adapters)
    return [out, *torch.autograd.grad((out * probe).sum() + sum(0 * leaf.sum() for leaf in leaves), leaves)]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 7),
    top_k=st.integers(1, 3),
    rank=st.integers(1, 5),
    which=st.sampled_from(["both", "gate_up", "down"]),
    elsewhere=st.booleans(),
)
@pytest.mark.parametrize("function", [low_rank_experts, "grouped_mm"])
def test_outputs_and_gradients(function, tiny_config, tokens, experts, top_k, rank, which, elsewhere):
    if function == "grouped_mm":
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        function, dtype, tolerance = experts_lora._grouped_mm_experts, torch.float32, 2e-4
    else:
        dtype, tolerance = torch.float64, 1e-9
    top_k = min(top_k, experts)
    module, inputs, adapters = problem(tiny_config, tokens, experts, top_k, rank, dtype, elsewhere)
    adapters = [a if which in ("both", name) else None for a, name in zip(adapters, ("gate_up", "down"))]
    probe = torch.randn_like(inputs[0])
    for seen, expected in zip(
        results(function, module, inputs, adapters, probe),
        results(plain_low_rank_experts, module, inputs, adapters, probe),
        strict=True,
    ):
        torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance)


def test_no_tokens(tiny_config):
    module, inputs, adapters = problem(tiny_config, 0, 4, 2, 3)
    out, *gradients = results(low_rank_experts, module, inputs, adapters, torch.ones_like(inputs[0]))
    assert out.shape == (0, 32) and not any(gradient.any() for gradient in gradients)


def test_the_reference_is_the_sum_of_weights(tiny_config):
    """Against experts whose weights are the sums, computed by the module's own loop."""
    module, inputs, adapters = problem(tiny_config, 30, 6, 2, 4)
    merged = Dsv3Experts(module.config).double()
    with torch.no_grad():
        merged.gate_up_proj.copy_(module.gate_up_proj + adapters[0].up_EOR @ adapters[0].down_ERI)
        merged.down_proj.copy_(module.down_proj + adapters[1].up_EOR @ adapters[1].down_ERI)
    expected = type(merged).forward.__wrapped__(merged, *inputs)
    torch.testing.assert_close(plain_low_rank_experts(module, *inputs, *adapters), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_to_fp64_as_the_plain_loop(tiny_config, autocast):
    module, inputs, adapters = problem(tiny_config, 64, 6, 2, 4)
    probe = torch.randn_like(inputs[0])
    exact = results(plain_low_rank_experts, module, inputs, adapters, probe)
    kind = torch.float32 if autocast else torch.bfloat16
    low = Dsv3Experts(module.config).to(kind).requires_grad_(False)
    low.load_state_dict({k: v.to(kind) for k, v in module.state_dict().items()})
    hidden, index, weights = inputs
    cast = (hidden.detach().to(kind).requires_grad_(), index, weights.detach().float().requires_grad_())
    adapters = [LowRank(*(t.detach().to(kind).requires_grad_() for t in adapter)) for adapter in adapters]
    errors = []
    for function in (low_rank_experts, plain_low_rank_experts):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            seen = results(function, low, cast, adapters, probe.to(kind))
        assert seen[0].dtype == kind
        errors.append([((s.double() - e).norm() / e.norm()).item() for s, e in zip(seen, exact)])
    for ours, plain in zip(*errors):
        assert ours < 1.2 * plain + 1e-3
