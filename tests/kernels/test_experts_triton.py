"""Triton's programs for experts, on a GPU where there is one and interpreted elsewhere, against float64.

What a compiled program does can be seen on a GPU only: the same tests run there, in bf16.
"""

import contextlib
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import transformers_dsv3
from tests.fake_gpu import Launches, fake_gpu, on_gpu
from tests.kernels.test_experts_grouped import NAMES, choose, error, exact, inputs_for, make_experts, plain, run
from tests.kernels.test_explain import block
from transformers_dsv3.compression.quantize import quantize
from transformers_dsv3.compression.quantized_weights import QuantizedExperts
from transformers_dsv3.kernels import backends, experts_auto, experts_triton, triton_support
from transformers_dsv3.kernels.experts_triton import experts_refusal, module_refusal, triton_experts
from transformers_dsv3.kernels.quantized_groups import dequantize


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter takes the bits of bf16 for whole numbers when it multiplies
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
NO_GPU = pytest.mark.skipif(DEVICE == "cuda", reason="about a machine without a GPU")


def on_device(*things):
    return [thing.to(DEVICE) for thing in things]


def served(experts, hidden, index, weights):
    """By Triton's programs, and not by what they leave a call to; results come back to the CPU."""
    hidden, index, weights = on_device(hidden, index, weights)
    assert experts_refusal(experts.to(DEVICE), hidden, weights) is None
    return triton_experts(experts, hidden, index, weights).cpu()


def case(tokens=9, num_experts=4, top_k=2, among=(0, 1, 3), dims=(12, 10), dtype=torch.float32, seed=0, power=1.0):
    """Experts, hidden states, chosen experts, mixing weights in fp32."""
    experts = make_experts(num_experts, *dims, dtype, seed=seed)
    hidden, weights = inputs_for(experts, tokens, top_k, dtype, seed=seed, weights_dtype=torch.float32)
    return experts, hidden, choose(tokens, top_k, list(among), seed, power), weights


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("load", [
    {"tokens": 1, "num_experts": 5, "top_k": 3, "among": range(5), "dims": (80, 72)},
    {"tokens": 40, "num_experts": 3, "among": [0, 2, 3], "dims": (33, 17)},  # 1 is idle, 3 of another rank
    {"tokens": 70, "num_experts": 3, "top_k": 1, "among": [1], "dims": (16, 40)},
    {"tokens": 150, "num_experts": 1, "top_k": 1, "among": [0], "dims": (32, 16)},  # high tiles
    {"tokens": 21, "num_experts": 2, "among": [0, 1], "dims": (64, 32)},
], ids=["one token", "ragged", "all to one", "many", "whole tiles"])  # fmt: skip
def test_outputs_and_gradients(load, dtype, measured, poisoned):
    arguments = case(**load, dtype=dtype)
    expected = exact(*arguments)
    theirs = run(plain, *arguments)
    for name, value, peer, reference in zip(NAMES, run(served, *arguments), theirs, expected):
        assert value.dtype == peer.dtype and value.shape == peer.shape
        if dtype == torch.float32:
            assert error(value, reference) <= 2e-6, name
            continue
        ratio = error(value, reference) / error(peer, reference)
        what = f"triton, {dtype} error over the plain path's, {name}"
        measured[what] = max(ratio, measured.get(what, 0.0))
        # Of a few values one rounding may be worse than several
        assert ratio <= 1.1 or error(value, reference) <= 0.5 * torch.finfo(dtype).eps, name


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    tokens=st.integers(0, 30),
    num_experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 36), st.integers(1, 36)),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    idle=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(tokens, num_experts, top_k, dims, power, idle, seed):
    among = list(range(num_experts + 1))[idle % num_experts :]  # the last one of another rank
    arguments = case(tokens, num_experts, min(top_k, len(among)), among, dims, seed=seed, power=power)
    ours = run(served, *arguments)
    for name, value, reference in zip(NAMES, ours, exact(*arguments)):
        assert value.dtype == torch.float32 and value.shape == reference.shape
        assert error(value, reference) <= 2e-5, name  # wide enough for sums of a single width that nearly cancel
    for idle_expert in set(range(num_experts)) - set(arguments[2].flatten().tolist()):
        assert not ours[3][idle_expert].any() and not ours[4][idle_expert].any()


@pytest.mark.parametrize("shape, num_experts", [((1, 6), 64), ((300, 2), 5), ((700, 3), 8), ((1300, 4), 300)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pairs_are_sorted_by_expert(shape, num_experts, dtype, poisoned):
    from transformers_dsv3.kernels.triton_src.experts_sort import sort_pairs

    index = torch.randint(-1, num_experts + 2, shape, generator=torch.Generator().manual_seed(0))
    order, offsets = sort_pairs(index.to(DEVICE, dtype), num_experts)
    elsewhere = (index < 0) | (index >= num_experts)
    experts, pairs = index.masked_fill(elsewhere, num_experts).flatten().sort(stable=True)
    assert order.cpu().tolist() == pairs.tolist()
    counts = torch.bincount(experts, minlength=num_experts + 1)[:-1]
    assert offsets.cpu().tolist() == [0, *counts.cumsum(0).tolist()]


def test_nothing_to_compute():
    experts, hidden, index, weights = case()
    everything_elsewhere = torch.full_like(index, 4)
    for value in run(served, experts, hidden, everything_elsewhere, weights):
        assert not value.any()
    for value in run(served, experts, hidden[:0], index[:0], weights[:0]):
        assert not value.any()
    with torch.no_grad():
        assert served(experts, hidden[:0], index[:0], weights[:0]).shape == (0, 12)


def test_one_expert_chosen_twice_by_a_token():
    experts, hidden, _, weights = case(tokens=3, num_experts=3, top_k=4, among=range(4))
    index = torch.tensor([[0, 0, 2, 0], [1, 2, 1, 2], [2, 2, 2, 2]])
    for name, value, reference in zip(
        NAMES, run(served, experts, hidden, index, weights), exact(experts, hidden, index, weights)
    ):
        assert error(value, reference) <= 2e-6, name


def test_infinities_stay_with_their_tokens():
    """Tiles have rows of other experts behind an expert's own, which must not leak."""
    experts, hidden, _, weights = case(tokens=6, num_experts=2, top_k=1, among=[0, 1])
    hidden[1] = float("inf")
    index = torch.tensor([[0], [1], [0], [0], [1], [0]])
    output, d_hidden, d_weights, d_gate_up, d_down = run(served, experts, hidden, index, weights)
    assert output[[0, 2, 3, 4, 5]].isfinite().all() and not output[1].isfinite().any()
    assert d_weights[[0, 2, 3, 4, 5]].isfinite().all() and d_hidden[[0, 2, 3, 4, 5]].isfinite().all()
    assert d_gate_up[0].isfinite().all() and d_down[0].isfinite().all()


@pytest.fixture(scope="module")
def everything():
    """All gradients of `case()`."""
    return run(served, *case())[1:]


@pytest.mark.parametrize("needs", range(1, 16))
def test_frozen_parts(needs, everything):
    """Only what is asked for gets a gradient, and the same one."""
    experts, hidden, index, weights = case()
    experts.to(DEVICE)
    leaves = [*(leaf.to(DEVICE) for leaf in (hidden, weights)), experts.gate_up_proj, experts.down_proj]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needs >> place & 1))
    output = triton_experts(experts, leaves[0], index.to(DEVICE), leaves[1])
    output.backward(torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).to(output))
    for place, (leaf, expected) in enumerate(zip(leaves, everything)):
        if needs >> place & 1:
            assert torch.equal(leaf.grad, expected.to(DEVICE))
        else:
            assert leaf.grad is None


def test_gradients_of_any_layout_and_accumulated():
    experts, hidden, index, weights = case()
    grads = (torch.randn(12, 9).t(), torch.ones(1, 1).expand(9, 12))
    for grad in grads:
        expected = exact(experts, hidden, index, weights, grad.double())
        experts.zero_grad()
        for times in (1, 2):
            served(experts, hidden.t().contiguous().t(), index.t().contiguous().t(), weights).backward(grad)
            assert error(experts.gate_up_proj.grad.cpu(), times * expected[3]) <= 2e-6
            assert error(experts.down_proj.grad.cpu(), times * expected[4]) <= 2e-6


def test_second_derivatives():
    experts, hidden, index, weights = on_device(*case())
    found = []
    for function in (triton_experts, plain):
        inputs = [hidden.detach().requires_grad_(), experts.gate_up_proj, experts.down_proj]
        output = function(experts, inputs[0], index, weights)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, HALF])
def test_autocast(hidden_dtype):
    """As the plain path: dtypes of results, errors no larger."""
    experts, hidden, index, weights = case(tokens=30, num_experts=3, among=range(3), dims=(24, 20))
    hidden = hidden.to(hidden_dtype)

    def under(function):
        return lambda *arguments: torch.autocast(DEVICE, HALF)(function)(*arguments)

    arguments = on_device(experts, hidden, index, weights)
    theirs = [value.cpu() for value in run(under(plain), *arguments)]
    ours = run(under(served), *arguments)
    for name, value, peer, reference in zip(NAMES, ours, theirs, exact(experts.cpu(), hidden, index, weights)):
        assert value.dtype == peer.dtype, name
        assert 1e-5 < error(value, reference) <= 1.1 * error(peer, reference), name


@pytest.mark.parametrize("tokens", [30, 90])  # under and above the low tiles
def test_results_repeat_and_rows_are_their_own(tokens):
    """Bits depend neither on the time nor on what other rows hold, nor on whether gradients are asked for."""
    experts, hidden, index, weights = case(tokens, num_experts=2, among=range(2), dims=(24, 10), dtype=HALF)
    first = run(served, experts, hidden, index, weights)
    for value, again in zip(first, run(served, experts, hidden, index, weights)):
        assert torch.equal(value, again)
    with torch.no_grad():
        assert torch.equal(served(experts, hidden, index, weights), first[0])
        other = hidden.clone()
        other[1::2] = torch.randn_like(other[1::2])
        assert torch.equal(served(experts, other, index, weights)[::2], first[0][::2])


def test_deterministic_algorithms():
    """Which fill memory before it is written: nothing here warns or raises, and the bits stay."""
    arguments = case()
    before = run(served, *arguments)
    torch.use_deterministic_algorithms(True)
    try:
        after = run(served, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_products_of_fp32_follow_pytorchs_setting():
    """Whose TF32 is the interpreter's fp32, with tiles of its own."""
    from transformers_dsv3.kernels.triton_src import experts_rows

    arguments = case(tokens=20, num_experts=3, among=range(3), dims=(40, 36))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert experts_rows.precision() == ("ieee" if torch.version.hip else "tf32")
        found = run(served, *arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    assert experts_rows.precision() == "ieee"
    for name, value, reference in zip(NAMES, found, exact(*arguments)):
        assert error(value, reference) <= (2e-6 if DEVICE == "cpu" else 2e-3), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    experts, hidden, index, weights = case()
    expected = run(served, experts, hidden, index, weights)
    leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
    output = checkpoint(served, experts, leaves[0], index, leaves[1], use_reentrant=reentrant)
    output.backward(torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).float())
    ours = [output, *(leaf.grad for leaf in (*leaves, experts.gate_up_proj, experts.down_proj))]
    for value, reference in zip(ours, expected):
        assert torch.equal(value, reference.to(value.device))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("tokens", [5, 70])
def test_int8_weights(tokens, dtype, poisoned):
    experts, hidden, index, weights = case(tokens, num_experts=3, among=[0, 1, 3], dims=(96, 32), dtype=dtype)
    experts.config._experts_implementation = "triton"
    quantized = QuantizedExperts(experts, bits=8)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(quantized, name), getattr(quantized, f"{name}_scale")
        getattr(experts, name).data = dequantize(weight, scale, torch.float32)
    expected = exact(experts, hidden, index, weights)[0]
    calls = []
    original = experts_triton.forward_operator
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_triton, "forward_operator", lambda *a: calls.append(1) or original(*a))
        output = quantized.to(DEVICE)(*on_device(hidden, index, weights))
    assert calls and output.dtype == dtype
    assert error(output.cpu(), expected) <= {torch.float32: 1e-6, torch.float16: 7e-4, torch.bfloat16: 5e-3}[dtype]


def test_int8_model(make_model):
    model = quantize(make_model(moe_intermediate_size=32))
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(tokens).logits
        model.to(DEVICE).set_experts_implementation("triton")
        torch.testing.assert_close(model(tokens.to(DEVICE)).logits.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_operators_are_registered_well():
    experts, hidden, index, weights = on_device(*case())
    hidden.requires_grad_(), weights.requires_grad_()
    gate_up, down = experts.parameters()
    for keep in (True, False):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor") if keep else ("test_faketensor",)
        arguments = (hidden, index, weights, gate_up, None, down, None, torch.float32, keep)
        torch.library.opcheck(experts_triton.forward_operator.default, arguments, test_utils=tests)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # of a cached function, which gives the same when traced
def test_compiles_without_a_break():
    arguments = case()
    torch._dynamo.reset()
    compiled = torch.compile(experts_auto.triton_experts, fullgraph=True, backend="aot_eager")
    expected = run(served, *arguments)
    ours = run(lambda *inputs: compiled(*on_device(*inputs)), *arguments)
    for value, reference in zip(ours, expected):
        assert torch.equal(value.cpu(), reference.cpu())


@pytest.fixture
def launches(monkeypatch):
    """Launches instead of programs: `(program, grid)` of each; and tensors on "cuda" count as on a GPU of Triton's."""
    from transformers_dsv3.kernels.triton_src import experts_backward, experts_forward, experts_sort

    made = []

    class Program:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: made.append((self.name, grid))

    programs = {
        experts_sort: ("sort_few", "count_chunk", "sort_chunk"),
        experts_forward: ("gate_up", "pair_product", "sum_pairs"),
        experts_backward: ("activation_gradient", "weight_gradient"),
    }
    for module, names in programs.items():
        for name in names:
            monkeypatch.setattr(module, name, Program(name))
    monkeypatch.setattr(experts_triton, "on_device", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    return made


@pytest.mark.parametrize("tokens, sorting", [(4, ["sort_few"]), (1000, ["count_chunk", "sort_chunk"])])
def test_the_host_never_waits(tokens, sorting, launches):
    """On tensors without values: reading one raises."""
    with fake_gpu(), torch.device("cuda"):
        hidden, weights = torch.empty(tokens, 16, dtype=torch.bfloat16), torch.empty(tokens, 4)
        index = torch.empty(tokens, 4, dtype=torch.long)
        gate_up, down = torch.empty(8, 48, 16, dtype=torch.bfloat16), torch.empty(8, 16, 24, dtype=torch.bfloat16)
        with pytest.raises(DataDependentOutputException):
            index.max().item()
        forward = (hidden, index, weights, gate_up, None, down, None, torch.bfloat16, True)
        kept = experts_triton._forward(*forward)[1:]
        assert [name for name, _ in launches] == [*sorting, "gate_up", "pair_product", "sum_pairs"]
        assert all(0 < grid[0] <= 8 * tokens * 4 for _, grid in launches)
        launches.clear()
        grads = experts_triton._backward(hidden, hidden, index, weights, gate_up, down, *kept, *[True] * 4)
        assert [grad.shape for grad in grads] == [x.shape for x in (hidden, weights, gate_up, down)]
    products = ["activation_gradient", "weight_gradient", "weight_gradient", "pair_product", "sum_pairs"]
    assert [name for name, _ in launches] == products


@NO_GPU
@pytest.mark.parametrize("training", [False, True])
def test_auto_takes_it_on_a_gpu(launches, training):
    experts = make_experts(8, 16, 24, torch.bfloat16).train(training)
    with fake_gpu(), torch.device("cuda"), torch.set_grad_enabled(training), Launches() as seen:
        on_cuda = types.SimpleNamespace(
            **{name: torch.empty(p.shape, dtype=p.dtype) for name, p in experts.named_parameters()},
            act_fn=nn.SiLU(), training=training, num_experts=8,
        )  # fmt: skip
        hidden, weights = torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(4, 2)
        experts_auto.auto_experts(on_cuda, hidden, torch.empty(4, 2, dtype=torch.long), weights)
    assert seen.names == ["transformers_dsv3.triton_experts"]


@NO_GPU
def test_explain_shows_it_on_a_gpu(tiny_config, monkeypatch):
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    with torch.device("meta"):
        model = transformers_dsv3.Dsv3ForCausalLM(tiny_config()).to(torch.bfloat16)
    with fake_gpu():
        found = block(transformers_dsv3.explain(on_gpu(model)), "experts (")
    assert [name for name, (used, _) in found.items() if used] == ["triton", "auto"]


@NO_GPU
def test_auto_leaves_the_cpu_to_others(monkeypatch):
    experts, hidden, index, weights = case()
    monkeypatch.setattr(backends.EXPERTS["triton"], "function", lambda *a: pytest.fail("interpreted"))
    experts_auto.auto_experts(experts, hidden, index, weights)
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    assert "is for GPUs, not cpu" in module_refusal(experts)


def test_modules_that_are_refused():
    experts = make_experts(3, 8, 6).to(DEVICE)
    assert module_refusal(experts) is None

    def reason(**fields):
        weights = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj, "act_fn": nn.SiLU()}
        return module_refusal(types.SimpleNamespace(**{**weights, **fields}))

    assert reason() is None
    assert "stacked" in reason(gate_up_proj=None)
    assert "contiguous" in reason(gate_up_proj=experts.gate_up_proj.detach().mT)
    assert "biases" in reason(has_bias=True)
    assert "(E, out, in)" in reason(is_transposed=True)
    assert "in turns" in reason(is_concatenated=False)
    assert "SwiGLU" in reason(act_fn=nn.GELU())
    assert "down_proj is torch.float64" in reason(down_proj=experts.down_proj.detach().double())
    assert "one dtype" in reason(down_proj=experts.down_proj.detach().half())
    assert "(E, 2I, D)" in reason(gate_up_proj=torch.empty(3, 8, 12, device=DEVICE))
    assert "with scales" in reason(gate_up_proj=torch.empty(3, 12, 8, dtype=torch.int8, device=DEVICE))
    assert "offloaded" in reason(gate_up_proj=experts.gate_up_proj.to("meta"))
    assert "is a TwoTensor" in reason(
        down_proj=TwoTensor(experts.down_proj.detach(), experts.down_proj.detach().clone())
    )


def test_calls_that_are_left_to_auto(monkeypatch):
    experts, hidden, index, weights = on_device(*case(dims=(32, 32)))
    assert experts_refusal(experts, hidden, weights) is None
    assert "activations of the weights' dtype" in experts_refusal(experts, hidden.bfloat16(), weights)
    assert "not torch.float64" in experts_refusal(experts, hidden.double(), weights)
    assert "not meta" in experts_refusal(experts, hidden.to("meta"), weights)
    quantized = QuantizedExperts(experts, bits=8)
    assert experts_refusal(quantized, hidden, weights) is None
    assert "INT8 weights, gate_up_proj is torch.uint8" in experts_refusal(
        QuantizedExperts(experts, bits=4).to(DEVICE), hidden, weights
    )
    assert "no gradients with INT8" in experts_refusal(quantized, hidden.clone().requires_grad_(), weights)

    def transformed(x):
        assert "torch.func" in experts_refusal(experts, x, weights)
        return x

    torch.func.vmap(transformed)(hidden[None])

    said = []
    monkeypatch.setattr(experts_auto.logger, "warning_once", said.append)
    double = experts.double()
    output = experts_auto.triton_experts(double, hidden.double(), index, weights.double())
    torch.testing.assert_close(output, plain(double, hidden.double(), index, weights.double()))
    reason = "it takes fp32, bf16, fp16 and INT8 weights, gate_up_proj is torch.float64."
    assert said == [f'experts_implementation="triton" does not serve a call: {reason}']


def test_chosen_by_name_for_a_whole_model(make_model, monkeypatch):
    model = make_model().to(DEVICE)
    tokens = torch.arange(1, 8, device=DEVICE)[None]
    calls = []
    refusal, original = experts_auto._BY_NAME["triton"]
    counted = (refusal, lambda *a: calls.append(1) or original(*a))
    monkeypatch.setitem(experts_auto._BY_NAME, "triton", counted)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(tokens).logits
        written = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert not calls
        model.set_experts_implementation("triton")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1  # one layer has experts
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), written)
        assert len(calls) == 5


def test_a_step_of_training(make_model):
    tokens = torch.arange(1, 13, device=DEVICE).view(2, 6)
    grads = {}
    for name in ("eager", "triton"):
        model = make_model(mtp_loss_weight=0.3).to(DEVICE).train()
        model.set_experts_implementation(name)
        model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert grads["eager"].keys() == grads["triton"].keys()
    assert any("experts.gate_up_proj" in key for key in grads["triton"])
    for key, grad in grads["eager"].items():
        torch.testing.assert_close(grads["triton"][key], grad, rtol=1e-3, atol=1e-6)
