"""Experts by one product an active expert, against the plain reference and float64."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from transformers_dsv3 import Dsv3Config
from transformers_dsv3.kernels import experts_grouped, matmul_cpu
from transformers_dsv3.kernels.experts_grouped import grouped_experts, lazy_zeros, module_refusal
from transformers_dsv3.models.dsv3.moe_dsv3 import Dsv3Experts


def make_experts(num_experts, hidden, inter, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = Dsv3Config(
        n_routed_experts=num_experts, n_group=1, topk_group=1, num_experts_per_tok=1, hidden_size=hidden,
        moe_intermediate_size=inter,
    )  # fmt: skip
    config._experts_implementation = "eager"
    experts = Dsv3Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


def choose(tokens, top_k, among, seed=0, power=1.0):
    """`(T, K)` different experts a token of the list `among`, the first ones the oftener the larger `power`."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.arange(1, len(among) + 1, dtype=torch.float64) ** -power
    if not tokens:
        return torch.empty(0, top_k, dtype=torch.long)
    return torch.tensor(among)[torch.multinomial(likely.expand(tokens, -1), top_k, generator=generator)]


def inputs_for(experts, tokens, top_k, dtype, seed=0, weights_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, experts.hidden_dim, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(weights_dtype or dtype)
    return hidden, weights


def run(function, experts, hidden, index, weights, grad=None):
    """Output and the gradients of hidden states, mixing weights, gate_up_proj and down_proj; zeros where none."""
    leaves = [hidden.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()]
    output = function(experts, leaves[0], index, leaves[1])
    leaves += [experts.gate_up_proj, experts.down_proj]
    grad = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape) if grad is None else grad
    if not output.requires_grad:  # no tokens
        return [output, *(torch.zeros_like(leaf) for leaf in leaves)]
    grads = torch.autograd.grad(output, leaves, grad.to(output.dtype), allow_unused=True)
    return [output, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads))]


def plain(experts, hidden, index, weights):
    return Dsv3Experts.forward(experts, hidden, index, weights)


def exact(experts, hidden, index, weights, grad=None):
    double = make_experts(experts.num_experts, experts.hidden_dim, experts.intermediate_dim, torch.float64)
    double.load_state_dict(experts.state_dict())
    if not len(index):  # which the plain path does not take
        return [torch.zeros_like(t) for t in (hidden, hidden, weights, *experts.parameters())]
    return run(plain, double, hidden.double(), index, weights.double(), grad)


NAMES = ["output", "hidden states", "mixing weights", "gate_up_proj", "down_proj"]


def error(value, reference):
    return ((value.double() - reference).norm() / reference.double().norm().clamp(min=1e-300)).item()


@pytest.fixture(params=["onednn", "mm"])
def library(request, monkeypatch):
    """Products of fp32 by oneDNN and by torch.mm, whichever this machine would take."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(matmul_cpu, "_onednn_is_faster", lambda: request.param == "onednn")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch leaves unwritten holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens, num_experts, top_k, among", [
    (7, 5, 2, [0, 1, 2, 3, 4]),
    (1, 5, 2, [1, 3]),
    (5, 4, 1, [2]),
    (3, 3, 3, [0, 1, 2]),
])  # fmt: skip
def test_gradients_by_finite_differences(tokens, num_experts, top_k, among):
    experts = make_experts(num_experts, 6, 5, torch.float64)
    hidden, weights = inputs_for(experts, tokens, top_k, torch.float64)
    index = choose(tokens, top_k, among)

    def function(hidden, weights, gate_up, down):
        module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=nn.SiLU())
        return grouped_experts(module, hidden, index, weights)

    leaves = [hidden.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    leaves[2:] = [leaf.detach().clone().requires_grad_() for leaf in leaves[2:]]
    assert torch.autograd.gradcheck(function, leaves)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    tokens=st.integers(0, 70),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    hidden=st.integers(1, 40),
    inter=st.integers(1, 40),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    idle=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
@pytest.mark.usefixtures("library")
def test_equals_the_reference(tokens, num_experts, top_k, hidden, inter, power, idle, seed):
    experts = make_experts(num_experts, hidden, inter, seed=seed)
    among = list(range(num_experts))[idle % num_experts :]
    top_k = min(top_k, len(among))
    index = choose(tokens, top_k, among, seed, power)
    hidden, weights = inputs_for(experts, tokens, top_k, torch.float32, seed)
    expected = exact(experts, hidden, index, weights)
    ours = run(grouped_experts, experts, hidden, index, weights)
    for name, value, reference in zip(NAMES, ours, expected):
        assert value.dtype == torch.float32 and value.shape == reference.shape
        assert error(value, reference) <= 2e-5, name  # wide enough for sums of a single width that nearly cancel
    for idle_expert in set(range(num_experts)) - set(index.flatten().tolist()):
        assert not ours[3][idle_expert].any() and not ours[4][idle_expert].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_exact_as_the_reference(dtype, weights_dtype, measured):
    experts = make_experts(6, 96, 80, dtype)
    hidden, weights = inputs_for(experts, 200, 3, dtype, weights_dtype=weights_dtype)
    index = choose(200, 3, [0, 1, 2, 3, 5], power=2.0)
    grad = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = exact(experts, hidden, index, weights, grad.double())
    theirs = run(plain, experts, hidden, index, weights, grad)
    ours = run(grouped_experts, experts, hidden, index, weights, grad)
    for name, value, peer, reference in zip(NAMES, ours, theirs, expected):
        assert value.dtype == peer.dtype
        ratio = error(value, reference) / error(peer, reference)
        what = f"grouped_cpu, {dtype} error over the plain path's, {name}"
        measured[what] = max(ratio, measured.get(what, 0.0))
        assert ratio <= 1.1, name


def test_experts_of_another_rank_are_left_out():
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 20, 3, torch.float32)
    index = choose(20, 3, [0, 1, 2, 3, 4])  # 4 is none of these
    expected = exact(experts, hidden, index, weights)
    for name, value, reference in zip(NAMES, run(grouped_experts, experts, hidden, index, weights), expected):
        assert error(value, reference) <= 2e-6, name
    everything_elsewhere = torch.full_like(index, 4)
    for value in run(grouped_experts, experts, hidden, everything_elsewhere, weights):
        assert not value.any()


def test_one_expert_chosen_twice_by_a_token():
    experts = make_experts(3, 12, 10)
    hidden, weights = inputs_for(experts, 5, 4, torch.float32)
    index = torch.tensor([[0, 0, 2, 0], [1, 2, 1, 2], [0, 1, 2, 0], [2, 2, 2, 2], [0, 1, 0, 1]])
    expected = exact(experts, hidden, index, weights)
    for name, value, reference in zip(NAMES, run(grouped_experts, experts, hidden, index, weights), expected):
        assert error(value, reference) <= 2e-6, name


def test_infinities_stay_with_their_tokens():
    """Rows that fill up an expert's products are other tokens', and must not leak."""
    experts = make_experts(2, 8, 8)
    hidden, weights = inputs_for(experts, 6, 1, torch.float32)
    hidden[1] = float("inf")
    index = torch.tensor([[0], [1], [0], [0], [1], [0]])
    output, _, d_weights, d_gate_up, d_down = run(grouped_experts, experts, hidden, index, weights)
    assert output[[0, 2, 3, 4, 5]].isfinite().all() and not output[1].isfinite().any()
    assert d_weights[[0, 2, 3, 4, 5]].isfinite().all()
    assert d_gate_up[0].isfinite().all() and d_down[0].isfinite().all()


@pytest.mark.parametrize("needs", range(1, 16))
def test_frozen_parts(needs):
    """Only what is asked for gets a gradient, and the same one."""
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 9, 2, torch.float32)
    index = choose(9, 2, [0, 1, 3])
    everything = run(grouped_experts, experts, hidden, index, weights)[1:]
    leaves = [hidden, weights, experts.gate_up_proj, experts.down_proj]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needs >> place & 1))
    output = grouped_experts(experts, hidden, index, weights)
    grad = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).float()
    output.backward(grad)
    for place, (leaf, expected) in enumerate(zip(leaves, everything)):
        if needs >> place & 1:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None


def test_gradients_of_any_layout_and_accumulated():
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 9, 2, torch.float32)
    index = choose(9, 2, [0, 1, 3])
    for grad in (torch.randn(12, 9).t(), torch.ones(1, 1).expand(9, 12), torch.randn(9, 24)[:, ::2]):
        expected = exact(experts, hidden, index, weights, grad.double())
        experts.zero_grad()
        for times in (1, 2):
            grouped_experts(experts, hidden.t().contiguous().t(), index, weights).backward(grad)
            assert error(experts.gate_up_proj.grad, times * expected[3]) <= 2e-6
            assert error(experts.down_proj.grad, times * expected[4]) <= 2e-6


def test_no_gradient_asked_for():
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 9, 2, torch.float32)
    index = choose(9, 2, [0, 1, 3])
    expected = exact(experts, hidden, index, weights)[0]
    with torch.no_grad():
        output = grouped_experts(experts, hidden, index, weights)
    assert not output.requires_grad and error(output, expected) <= 2e-6
    experts.requires_grad_(False)
    assert not grouped_experts(experts, hidden, index, weights).requires_grad


def test_second_derivatives():
    experts = make_experts(3, 8, 6).double()
    hidden, weights = inputs_for(experts, 5, 2, torch.float64)
    index = choose(5, 2, [0, 1, 2])
    inputs = [x.detach().requires_grad_() for x in (hidden, weights, experts.gate_up_proj, experts.down_proj)]

    def outputs(hidden, weights, gate_up, down):
        module = SimpleNamespace(**{**vars(experts), "gate_up_proj": gate_up, "down_proj": down})
        module.act_fn = experts.act_fn
        return grouped_experts(module, hidden, index, weights)

    assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weights_dtype):
    """As the plain path: dtypes of results, errors no larger."""
    experts = make_experts(6, 48, 40)
    hidden, weights = inputs_for(experts, 120, 3, torch.float32, weights_dtype=weights_dtype)
    index = choose(120, 3, [0, 1, 2, 4, 5])
    expected = exact(experts, hidden, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = run(plain, experts, hidden, index, weights)
        ours = run(grouped_experts, experts, hidden, index, weights)
    outside = run(
        lambda *a: torch.autocast("cpu", torch.bfloat16)(grouped_experts)(*a), experts, hidden, index, weights
    )
    for name, value, peer, reference, after in zip(NAMES, ours, theirs, expected, outside):
        assert value.dtype == peer.dtype, name
        assert 1e-4 < error(value, reference) <= 1.1 * error(peer, reference), name
        assert torch.equal(value, after), name  # the backward pass inside and outside of autocast


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 30, 2, torch.float32)
    index = choose(30, 2, [0, 1, 3])
    expected = run(grouped_experts, experts, hidden, index, weights)
    ours = run(
        lambda *args: checkpoint(grouped_experts, *args, use_reentrant=reentrant), experts, hidden, index, weights
    ) if not reentrant else None  # fmt: skip
    if reentrant:  # takes .backward only
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = checkpoint(grouped_experts, experts, leaves[0], index, leaves[1], use_reentrant=True)
        output.backward(torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).float())
        ours = [output, *(leaf.grad for leaf in (*leaves, experts.gate_up_proj, experts.down_proj))]
    for value, reference in zip(ours, expected):
        assert torch.equal(value, reference)


def test_results_repeat():
    experts = make_experts(6, 48, 40)
    hidden, weights = inputs_for(experts, 120, 3, torch.float32)
    index = choose(120, 3, list(range(6)))
    for first, second in zip(*(run(grouped_experts, experts, hidden, index, weights) for _ in range(2))):
        assert torch.equal(first, second)


def test_operators_are_registered_well():
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 9, 2, torch.float32)
    arguments = (hidden.requires_grad_(), choose(9, 2, [0, 1, 3]), weights.requires_grad_())
    for keep in (True, False):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor") if keep else ("test_faketensor",)
        torch.library.opcheck(
            experts_grouped.forward_operator.default,
            (*arguments, *experts.parameters(), torch.float32, keep),
            test_utils=tests,
        )


def test_compiles_without_a_break():
    experts = make_experts(4, 12, 10)
    hidden, weights = inputs_for(experts, 9, 2, torch.float32)
    index = choose(9, 2, [0, 1, 3])
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    expected = run(grouped_experts, experts, hidden, index, weights)
    for value, reference in zip(run(compiled, experts, hidden, index, weights), expected):
        assert torch.equal(value, reference)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gradients_of_idle_experts_occupy_no_memory():
    zeros = lazy_zeros((4, 3), torch.bfloat16)
    assert zeros.shape == (4, 3) and zeros.dtype == torch.bfloat16 and not zeros.any()
    hidden, inter, num_experts = 512, 2048, 32  # 12 MB an expert, 384 MB together
    weight = torch.randn(2 * inter, hidden)
    # Weights of one expert seen 32 times, so that they take no memory either
    module = SimpleNamespace(
        gate_up_proj=weight.expand(num_experts, -1, -1).requires_grad_(),
        down_proj=weight[:inter].t().expand(num_experts, -1, -1).requires_grad_(),
        act_fn=nn.SiLU(),
    )
    tokens = torch.randn(8, hidden)
    index = torch.tensor([[3, 17]]).expand(8, 2)
    output = grouped_experts(module, tokens, index, torch.rand(8, 2))
    before = resident()
    grads = torch.autograd.grad(output.sum(), [module.gate_up_proj, module.down_proj])
    grown = resident() - before
    whole = sum(grad.nbytes for grad in grads)
    # Two experts' own, and what comes and goes beside it
    assert 1.5 / 32 * whole < grown < 5 / 32 * whole
    assert grads[0][3].any() and grads[0][17].any() and not grads[0][[0, 2, 4, 16, 18, 31]].any()


def test_it_is_chosen_by_name(make_model):
    model = make_model()
    tokens = torch.arange(1, 13).view(2, 6)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    assert ALL_EXPERTS_FUNCTIONS["grouped_cpu"] is grouped_experts
    model.set_experts_implementation("grouped_cpu")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_reasons():
    experts = make_experts(3, 8, 6)
    assert module_refusal(experts) is None
    hidden, weights = inputs_for(experts, 5, 2, torch.float32)
    index = choose(5, 2, [0, 1, 2])

    def reason(**fields):
        module = SimpleNamespace(
            **{
                **{"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj, "act_fn": nn.SiLU()},
                **fields,
            }
        )
        with pytest.raises(ValueError, match="grouped_cpu"):
            grouped_experts(module, hidden, index, weights)
        return module_refusal(module)

    assert "for CPUs" not in reason(gate_up_proj=experts.gate_up_proj.to("meta"))
    assert "not in memory" in reason(gate_up_proj=experts.gate_up_proj.to("meta"))
    assert "torch.int8" in reason(down_proj=experts.down_proj.detach().to(torch.int8))
    assert "down_proj torch.float64" in reason(down_proj=experts.down_proj.detach().double())
    assert "(E, 2I, D)" in reason(gate_up_proj=experts.gate_up_proj.detach().mT)
    assert "the activation is GELU" in reason(act_fn=nn.GELU())
    assert "stacked" in reason(gate_up_proj=None)
    assert "biases" in reason(has_bias=True)
    assert "in turns" in reason(is_concatenated=False)

    class Wrapped(torch.Tensor):
        pass

    assert "is a Wrapped" in reason(down_proj=experts.down_proj.detach().as_subclass(Wrapped))
    with pytest.raises(ValueError, match="hidden states are torch.bfloat16, weights torch.float32"):
        grouped_experts(experts, hidden.bfloat16(), index, weights)


@pytest.mark.usefixtures("library")
def test_products_of_any_layout():
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in [(1, 1, 1), (3, 5, 7), (0, 4, 2), (4, 0, 2), (33, 17, 65)]:
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        for a in (left, left.t().contiguous().t(), F.pad(left, [1, 2])[:, 1 : 1 + inner]):
            for b in (right, right.t().contiguous().t(), F.pad(right, [1, 2])[:, 1 : 1 + columns]):
                expected = left.double() @ right.double()
                for out in (None, torch.empty(rows, columns), torch.empty(columns, rows, dtype=torch.float64).t()):
                    product = matmul_cpu.matmul(a, b, out)
                    assert out is None or product is out
                    assert torch.allclose(product.double(), expected, atol=1e-5)
