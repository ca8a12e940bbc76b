"""Gradients of weights that are put off: those of one backward pass, however it is served, and computed when asked."""

import copy

import pytest
import torch
from torch import nn

from transformers_dsv3.kernels import experts_grouped, linear_onednn, weight_gradients
from transformers_dsv3.kernels.weight_gradients import WeightGradients, call_linear, putting_off, store_for


def run(function, module, *inputs):
    """Gradients of the inputs and of the module's parameters, and which of the latter a store took."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    function(module, *inputs).float().square().sum().backward()
    return [x.grad for x in inputs if x.requires_grad], [p.grad for p in module.parameters()]


def check(function, module, *inputs):
    plain_inputs, plain = run(function, module, *inputs)
    module.zero_grad()
    store = WeightGradients()
    with putting_off(store):
        apart_inputs, before = run(function, module, *inputs)
        compute = store.take()
        again_inputs, _ = run(function, module, *inputs)
    weights = [p for p in module.parameters() if p.dim() > 1]
    assert all(weight.grad is None for weight in weights) and len(before) == len(plain)
    compute()
    for parameter, expected in zip(module.parameters(), plain):
        if parameter.dim() > 1:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)
    store.take()()  # of the second pass, added
    for weight, expected in zip(weights, [g for g in plain if g.dim() > 1]):
        torch.testing.assert_close(weight.grad, 2 * expected, rtol=1e-5, atol=1e-5)
    for mine, again, expected in zip(apart_inputs, again_inputs, plain_inputs):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(mine, again)
    assert not store._left
    module.zero_grad()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_layers(bias, autocast):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 9, 24)

    def call(layer, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call_linear(layer, x)

    check(call, layer, x)


def test_linear_layers_by_onednn():
    torch.manual_seed(0)
    check(lambda layer, x: linear_onednn.linear(x, layer.weight), nn.Linear(24, 40, bias=False), torch.randn(2, 9, 24))


@pytest.fixture
def experts(make_model):
    module = make_model().get_decoder().layers[1].mlp.experts
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    generator = torch.Generator().manual_seed(0)
    tokens, number = 33, module.num_experts
    hidden = torch.randn(tokens, module.hidden_dim, generator=generator)
    # The last expert gets no token
    index = torch.rand(tokens, number - 1, generator=generator).topk(2, dim=1)[1]
    return module, hidden, index, torch.rand(tokens, 2, generator=generator)


def test_grouped_experts(experts):
    check(experts_grouped.grouped_experts, *experts)


def test_experts_by_triton(experts):
    triton = pytest.importorskip("transformers_dsv3.kernels.experts_triton")
    if (reason := triton.module_refusal(experts[0])) is not None:
        pytest.skip(reason)
    check(triton.triton_experts, *experts)


def test_what_is_computed_again_in_the_backward_pass_uses_the_store():
    torch.manual_seed(0)

    def twice(layer, x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: call_linear(layer, call_linear(layer, x).tanh()), x, use_reentrant=False
        )

    check(twice, nn.Linear(16, 16, bias=False), torch.randn(5, 16))


def test_what_is_no_plain_trained_parameter_is_left_to_autograd():
    layer = nn.Linear(8, 8)
    assert store_for(layer.weight) is None
    with putting_off(WeightGradients()) as _:
        assert store_for(layer.weight) is weight_gradients._store
        assert store_for(layer.weight * 2) is None
        frozen = copy.deepcopy(layer).requires_grad_(False)
        assert store_for(layer.weight, frozen.weight) is None
        layer.register_forward_hook(lambda *_: None)
        call_linear(layer, torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert store_for(layer.weight) is None
