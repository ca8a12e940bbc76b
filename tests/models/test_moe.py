"""Router and experts against plain loops, and the correction bias, which stays in fp32."""

import copy
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from transformers_dsv3 import Dsv3Config, Dsv3ForCausalLM
from transformers_dsv3.models.dsv3.moe_dsv3 import Dsv3Experts, Dsv3MoE, Dsv3TopkRouter


def naive_route(hidden, weight, bias, n_group, topk_group, top_k, normalise, scaling):
    """One token at a time in float64: `{expert: weight}` and the smallest gap that decided a choice."""
    num_experts = len(weight)
    size = num_experts // n_group
    routes, gap = [], math.inf
    for token in hidden.double().tolist():
        logits = [sum(w * x for w, x in zip(row, token)) for row in weight.double().tolist()]
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        biased = [score + b for score, b in zip(scores, bias.double().tolist())]
        groups = [sorted(biased[g * size : (g + 1) * size])[::-1] for g in range(n_group)]
        ranked = sorted(range(n_group), key=lambda g: -sum(groups[g][:2]))
        if topk_group < n_group:
            gap = min(gap, sum(groups[ranked[topk_group - 1]][:2]) - sum(groups[ranked[topk_group]][:2]))
        allowed = [e for e in range(num_experts) if e // size in ranked[:topk_group]]
        allowed.sort(key=lambda e: -biased[e])
        if top_k < len(allowed):
            gap = min(gap, biased[allowed[top_k - 1]] - biased[allowed[top_k]])
        chosen = allowed[:top_k]
        total = sum(scores[e] for e in chosen) if normalise else 1.0
        routes.append({e: scores[e] / total * scaling for e in chosen})
    return routes, gap


def small_config(**fields):
    defaults = {"hidden_size": 12, "moe_intermediate_size": 10, "intermediate_size": 10, "n_shared_experts": 1}
    return Dsv3Config(**{**defaults, **fields})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n_group=st.integers(1, 5),
    size=st.integers(1, 5),
    topk_group=st.integers(1, 5),
    top_k=st.integers(1, 8),
    tokens=st.integers(1, 9),
    normalise=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 1000),
)
def test_router_equals_a_loop(n_group, size, topk_group, top_k, tokens, normalise, scaling, seed):
    topk_group = min(topk_group, n_group)
    assume(n_group == 1 or size >= 2)
    top_k = min(top_k, topk_group * size)
    config = small_config(
        n_routed_experts=n_group * size,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalise,
        routed_scaling_factor=scaling,
    )
    generator = torch.Generator().manual_seed(seed)
    router = Dsv3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(generator=generator)
    hidden = torch.randn(tokens, 12, generator=generator)
    routes, gap = naive_route(
        hidden, router.weight, router.e_score_correction_bias, n_group, topk_group, top_k, normalise, scaling
    )
    assume(gap > 1e-5)  # nearer choices are for rounding to make
    logits, weights, indices = router(hidden)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.allclose(logits.double(), hidden.double() @ router.weight.double().T, atol=1e-5)
    for token, route in enumerate(routes):
        assert sorted(indices[token].tolist()) == sorted(route)
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist()):
            assert weight == pytest.approx(route[expert], rel=1e-5)


def test_bias_chooses_but_does_not_weigh():
    config = small_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    router = Dsv3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    _, weights, indices = router(torch.randn(20, 12))
    assert all(sorted(row) == [1, 3] for row in indices.tolist())
    assert torch.allclose(weights.sum(-1), torch.full((20,), config.routed_scaling_factor))
    assert bool((weights.std(dim=0) > 0).all())


def experts_inputs(tokens, num_experts, top_k, seed=0, never=()):
    """A small `Dsv3Experts` and tokens that choose among the experts not in `never`."""
    torch.manual_seed(seed)
    # Widths of whole 16 bytes, which grouped_mm asks for
    config = small_config(
        n_routed_experts=num_experts, n_group=1, topk_group=1, num_experts_per_tok=top_k, hidden_size=16,
        moe_intermediate_size=8,
    )  # fmt: skip
    experts = Dsv3Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    choices = torch.tensor([e for e in range(num_experts) if e not in never])
    indices = torch.stack([choices[torch.randperm(len(choices))[:top_k]] for _ in range(tokens)])
    return experts, torch.randn(tokens, 16), indices, torch.rand(tokens, top_k)


def run_experts(experts, hidden, indices, weights, how):
    """Output and gradients of input, mixing weights and parameters."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    if how == "loop":
        gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
        rows = []
        for token in range(len(hidden)):
            total = torch.zeros(16, dtype=torch.float64)
            for expert, weight in zip(indices[token].tolist(), weights[token].double()):
                gate, up = (gate_up[expert] @ hidden[token].double()).chunk(2)
                total = total + weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
            rows.append(total)
        output = torch.stack(rows)
    else:
        experts.config._experts_implementation = how
        output = experts(hidden, indices, weights)
    parameters = [hidden, weights, *experts.parameters()]
    gradients = torch.autograd.grad((output * output.detach().cos()).sum(), parameters, allow_unused=True)
    return [output, *gradients]


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    "tokens, num_experts, top_k, never",
    [(9, 6, 3, ()), (1, 6, 2, ()), (5, 6, 2, (0, 3, 5)), (4, 1, 1, ()), (7, 4, 4, ()), (40, 3, 1, (2,))],
)
def test_experts_equal_a_loop(how, tokens, num_experts, top_k, never):
    """Outputs and gradients, one token and experts that nobody chooses among them."""
    experts, hidden, indices, weights = experts_inputs(tokens, num_experts, top_k, never=never)
    expected = run_experts(experts, hidden, indices, weights, "loop")
    ours = run_experts(experts, hidden, indices, weights, how)
    for value, reference in zip(ours, expected):
        assert (value - reference).norm() <= 1e-5 * reference.norm()
    for expert in never:
        assert bool((ours[3][expert] == 0).all() and (ours[4][expert] == 0).all())


def test_experts_of_another_rank_add_nothing():
    """Under expert parallelism, an index past the last expert marks a token's pair that another rank computes."""
    experts, hidden, indices, weights = experts_inputs(6, 4, 2)
    experts.config._experts_implementation = "eager"
    elsewhere = torch.zeros_like(indices, dtype=torch.bool)
    elsewhere[1, 0] = elsewhere[4] = True
    output = experts(hidden, indices.masked_fill(elsewhere, 4), weights)
    expected = experts(hidden, indices, weights.masked_fill(elsewhere, 0.0))
    assert torch.allclose(output, expected, atol=1e-6)
    assert bool((output[4] == 0).all())


@pytest.mark.parametrize("n_shared_experts", [0, 1, 2])
def test_shared_experts_are_added(n_shared_experts):
    torch.manual_seed(0)
    config = small_config(
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, n_shared_experts=n_shared_experts
    )
    moe = Dsv3MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.3)
    hidden = torch.randn(2, 5, 12)
    _, weights, indices = moe.gate(hidden)
    routed = moe.experts(hidden.flatten(0, 1), indices, weights).view_as(hidden)
    width = 10 * n_shared_experts
    assert moe.shared_experts.down_proj.weight.shape == (12, width)
    shared = moe.shared_experts
    gate = hidden @ shared.gate_proj.weight.T
    extra = (gate * gate.sigmoid() * (hidden @ shared.up_proj.weight.T)) @ shared.down_proj.weight.T
    assert torch.allclose(moe(hidden), routed + extra, atol=1e-6)


# Values that bf16 and fp16 cannot hold
BIAS = torch.tensor([1.0 + 1e-3 * i + 1e-7 for i in range(8)])


def biases(model):
    found = [module.e_score_correction_bias for module in model.modules() if isinstance(module, Dsv3TopkRouter)]
    assert len(found) == 2  # one layer of the model, one MTP layer
    return found


def assert_exact(model):
    for bias in biases(model):
        assert bias.dtype == torch.float32
        assert torch.equal(bias.cpu(), BIAS)


@pytest.fixture
def biased(make_model):
    model = make_model()
    for bias in biases(model):
        bias.copy_(BIAS)
    return model


class TestBiasStaysInFp32:
    @pytest.mark.parametrize(
        "cast",
        [
            lambda model: model.to(torch.bfloat16),
            lambda model: model.bfloat16(),
            lambda model: model.half(),
            lambda model: model.to(torch.float64),
            lambda model: model.half().float(),
            lambda model: model.to("cpu", torch.bfloat16).to(torch.float16).double(),
            lambda model: copy.deepcopy(model.bfloat16()),
            lambda model: copy.deepcopy(model).half(),
            lambda model: model.apply(lambda module: module.to(torch.bfloat16)),
            lambda model: model.type(torch.bfloat16),
        ],
        ids=[
            "to(bf16)", "bfloat16()", "half()", "to(float64)", "half().float()", "a chain", "deepcopy after",
            "deepcopy before", "each module", "type(bf16)",
        ],
    )  # fmt: skip
    def test_casts(self, cast, biased):
        assert_exact(cast(biased))

    def test_the_rest_is_cast(self, biased):
        biased.to(torch.bfloat16)
        assert {parameter.dtype for parameter in biased.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_from_config(self, dtype, tiny_config):
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert all(bias.dtype == torch.float32 for bias in biases(model))

    def test_under_another_default_dtype(self, tiny_config):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Dsv3ForCausalLM(tiny_config())
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(bias.dtype == torch.float32 for bias in biases(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
    def test_from_pretrained(self, dtype, biased, tmp_path):
        biased.to(torch.bfloat16).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
        assert_exact(loaded)

    def test_state_dict(self, biased, make_model):
        model = make_model(seed=1).to(torch.bfloat16)
        model.load_state_dict(biased.state_dict())
        assert_exact(model)
        model = make_model(seed=1).to(torch.bfloat16)
        model.load_state_dict(biased.state_dict(), assign=True)
        assert_exact(model)

    def test_meta_device(self, biased):
        biased.to("meta", torch.bfloat16)
        assert all(bias.dtype == torch.float32 and bias.is_meta for bias in biases(biased))
        empty = biased.to_empty(device="cpu")
        assert all(bias.dtype == torch.float32 and not bias.is_meta for bias in biases(empty))

    def test_autocast(self, biased):
        seen = {}
        gate = biased.model.layers[1].mlp.gate
        gate.register_forward_hook(lambda module, inputs, outputs: seen.update(logits=outputs[0], weights=outputs[1]))
        tokens = torch.randint(96, (2, 6))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            output = biased(tokens, output_router_logits=True)
        assert output.logits.dtype == torch.bfloat16
        assert {router.dtype for router in output.router_logits} == {torch.float32}
        assert seen["logits"].dtype == seen["weights"].dtype == torch.float32
        assert_exact(biased)

    def test_a_bias_cast_by_force_is_refused(self, biased):
        """FSDP1's MixedPrecision(buffer_dtype=...) assigns the buffer: its values are lost, which nobody would see."""
        biased.model.layers[1].mlp.gate.e_score_correction_bias = BIAS.bfloat16()
        with pytest.raises(RuntimeError, match="buffer_dtype"):
            biased(torch.tensor([[1, 2]]))

    def test_training_step_in_bf16_leaves_it_alone(self, biased):
        biased.to(torch.bfloat16).train()
        optimizer = torch.optim.SGD(biased.parameters(), lr=1e-2)
        tokens = torch.randint(96, (2, 6))
        biased(tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert_exact(biased)


@pytest.fixture
def one_process(monkeypatch):
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def test_fsdp_mixed_precision(one_process, biased):
    """FSDP2 in bf16: the bias keeps its values, routing stays in fp32, gradients reach every parameter in use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    tokens = torch.randint(96, (2, 6))
    with torch.no_grad():
        plain = biased(tokens).logits
    for layer in biased.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(biased, mesh=mesh, mp_policy=policy)
    biased.train()
    output = biased(tokens, labels=tokens, output_router_logits=True)
    assert output.router_logits[0].dtype == torch.float32
    output.loss.backward()
    assert_exact(biased)
    assert (output.logits - plain).norm() < 0.05 * plain.norm()
    for name, parameter in biased.named_parameters():
        assert (parameter.grad is not None) == (".mtp." not in name), name


@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_no_tokens_at_all(tiny_config, implementation):
    """A rank of expert parallelism may get none."""
    config = tiny_config(experts_implementation=implementation)
    experts = Dsv3Experts(config).eval()
    chosen = torch.empty(0, config.num_experts_per_tok)
    with torch.no_grad():
        assert experts(torch.empty(0, config.hidden_size), chosen.long(), chosen).shape == (0, config.hidden_size)
