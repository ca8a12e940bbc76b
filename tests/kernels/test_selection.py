"""Who serves a call: the environment's choice, the caller's, and the reasons why the compiled backend refuses."""

import json

import peft
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from tests import programs
from transformers_dsv3.kernels import selection
from transformers_dsv3.kernels.cpu import attention as mla_cpu
from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.cpu import linear as linear_cpu
from transformers_dsv3.kernels.cpu import mixture as experts_cpu
from transformers_dsv3.kernels.selection import cpu_refusal, parse
from transformers_dsv3.models.dsv3 import decoding_dsv3


TOKENS = torch.tensor([[5, 17, 2, 44, 8, 9]])


class Spy:
    """The loaded library, noting which of its functions are called."""

    def __init__(self, library):
        self.library, self.calls = library, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.library, name)


@pytest.fixture
def spy(compiled, monkeypatch):
    spy = Spy(cpu_library.loaded)
    monkeypatch.setattr(cpu_library, "loaded", spy)
    # Small models' layers as well
    monkeypatch.setattr(linear_cpu, "FEWEST_BYTES", 0)
    return spy


def run(model, tokens=TOKENS):
    """Logits of a prefill and of a step with its cache."""
    with torch.no_grad():
        first = model(tokens[:, :-1], use_cache=True)
        second = model(tokens[:, -1:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def test_the_variable_is_parsed():
    nothing = {"experts": "auto", "linear": "auto", "attention": "auto", "pages": "huge"}
    assert parse("") == parse(" , ") == nothing
    assert parse(" experts = grouped_mm , isa=avx2,") == {**nothing, "experts": "grouped_mm", "isa": "avx2"}
    assert parse("linear=torch,attention=cpu") == {**nothing, "linear": "torch", "attention": "cpu"}
    assert parse("attention=flash_mla") == {**nothing, "attention": "flash_mla"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("cpu", "'cpu' is not one of"),
        ("expert=cpu", "'expert=cpu' is not one of"),
        ("linear=mkl", "linear is one of auto, torch, cpu, triton, not 'mkl'"),
        (
            "linear=torch,attention=",
            "attention is one of auto, torch, cpu, triton, flash_mla, flash_attention_3_mla, not ''",
        ),
        ("isa=sse2", "isa is one of amx, avx512, avx_vnni, avx2, neon_dot, neon, portable, not 'sse2'"),
    ],
)
def test_what_the_variable_cannot_mean_is_refused(text, message):
    with pytest.raises(ValueError, match=f"TRANSFORMERS_DSV3_BACKENDS: .*{message}"):
        parse(text)


def test_choices_of_a_block_end_with_it():
    before = dict(selection.chosen)
    with pytest.raises(KeyError), selection.use(linear="torch"):
        assert selection.chosen["linear"] == "torch"
        with selection.use(linear="cpu", attention="torch"):
            assert (selection.chosen["linear"], selection.chosen["attention"]) == ("cpu", "torch")
        assert selection.chosen == {**before, "linear": "torch"}
        raise KeyError
    assert selection.chosen == before
    for choices in ({"linear": "mkl"}, {"experts": "eager"}, {"isa": "avx2"}):
        with pytest.raises(ValueError, match="is not a choice"), selection.use(**choices):
            pass


@torch.no_grad()
def test_calls_that_are_refused_and_why(compiled, monkeypatch):
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    trained = torch.nn.Parameter(weight)
    with torch.enable_grad():
        assert cpu_refusal("linear", x, trained) == "has no gradients"
        assert cpu_refusal("linear", x.clone().requires_grad_(), weight) == "has no gradients"
        assert cpu_refusal("linear", x, weight) == "has no gradients"  # as before it was frozen
    assert cpu_refusal("linear", x, weight) is None
    assert cpu_refusal("linear", x, weight.to(torch.int8)) is None
    assert cpu_refusal("linear", x, trained) is None
    with torch.inference_mode():
        assert cpu_refusal("linear", x, trained) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_refusal("linear", x, weight) == "does not follow autocast"
    assert "not torch.float64" in cpu_refusal("linear", x.double(), weight.double())
    assert "not torch.float16" in cpu_refusal("linear", x.half(), weight.half())
    assert "not torch.bfloat16" in cpu_refusal("linear", x, weight.bfloat16())
    assert "for CPUs, not meta" in cpu_refusal("linear", x.to("meta"), weight.to("meta"))
    assert "not on meta" in cpu_refusal("linear", x, weight.to("meta"))
    assert "not TwoTensor" in cpu_refusal("linear", x, TwoTensor(weight, weight))
    assert "not TwoTensor" in cpu_refusal("linear", TwoTensor(x, x), weight)
    with selection.use(linear="torch"):
        assert "as chosen" in cpu_refusal("linear", x, weight)
        assert cpu_refusal("attention", x, weight) is None
    assert "contiguous" in linear_cpu.linear_refusal(x, torch.randn(9000, 8).T.contiguous().T[:, :8])
    monkeypatch.delitem(linear_cpu.MOST_ROWS, torch.bfloat16, raising=False)
    monkeypatch.setattr(cpu_library, "in_use", "avx512")  # which has no matrix units
    many = torch.randn(linear_cpu.MOST_BF16_ROWS + 1, 512).bfloat16()
    assert "rows of bf16" in linear_cpu.linear_refusal(many, torch.randn(512, 512).bfloat16())
    assert linear_cpu.linear_refusal(many[:-1], torch.randn(512, 512).bfloat16()) is None


@torch.no_grad()
def test_a_sharded_tensor_is_refused(compiled):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(4, 8), init_device_mesh("cpu", (1,)))
        assert cpu_refusal("linear", torch.randn(2, 8), weight) == "takes plain tensors, not DTensor"
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_a_refusal_of_what_was_chosen_by_name_is_told(compiled, monkeypatch):
    warnings = []
    monkeypatch.setattr(selection.logger, "warning_once", warnings.append)
    x = torch.randn(2, 8)
    assert cpu_refusal("attention", x.double()) and not warnings
    with selection.use(attention="cpu"):
        cpu_refusal("attention", x)
        assert not warnings
        cpu_refusal("attention", x.double())
    assert warnings == [
        "The compiled CPU backend does not serve attention: it takes bf16 and fp32, not torch.float64."
    ]


def test_modules_that_are_refused_and_why(compiled, make_model):
    moe = make_model().model.layers[1].mlp
    x = torch.randn(3, 32)

    @torch.no_grad()
    def refusal():
        return experts_cpu.mixture_refusal(x, moe.experts, None, moe.shared_experts)

    assert refusal() is None
    for module in (moe.shared_experts, moe.experts, moe.shared_experts.up_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *a: None)
            assert "has hooks" in refusal()
            handle.remove()
            assert refusal() is None
    moe.shared_experts.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
    assert "without bias, down_proj" in refusal()
    moe.shared_experts.down_proj.bias = None
    activation, moe.experts.act_fn = moe.experts.act_fn, torch.nn.GELU()
    assert "SwiGLU only" in refusal()
    moe.experts.act_fn = activation
    weight = moe.experts.down_proj.data
    moe.experts.down_proj.data = weight.mT.contiguous().mT
    assert "down_proj is not" in refusal()
    moe.experts.down_proj.data = weight.bfloat16()
    assert "one dtype" in refusal()
    moe.experts.down_proj.data = weight
    assert refusal() is None


@pytest.mark.parametrize(
    "targets", [["q_b_proj", "o_proj", "kv_b_proj", "lm_head"], ["gate_proj", "up_proj", "down_proj"]]
)
def test_adapters_are_run(spy, make_model, targets):
    """PEFT's layers, and its adapters of the experts' stacked weights, into which it turns the second targets."""
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    with_adapters = run(model)
    with pytest.MonkeyPatch.context() as patch, selection.use(linear="torch", attention="torch"):
        patch.setitem(selection.chosen, "experts", "eager")
        model.base_model.model.set_experts_implementation("eager")
        torch.testing.assert_close(run(model), with_adapters, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (run(model) - with_adapters).abs().max() > 1e-2


def test_layers_of_other_classes_are_run(spy, make_model):
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = make_model()
    before = run(model)
    shared = model.model.layers[1].mlp.shared_experts
    layer = Doubled(shared.up_proj.in_features, shared.up_proj.out_features, bias=False)
    layer.weight = shared.up_proj.weight
    shared.up_proj = layer
    with torch.no_grad():
        assert experts_cpu.mlp_refusal(shared).startswith("takes plain layers, up_proj is a ")
    assert (run(model) - before).abs().max() > 1e-3


def test_hooks_are_run(spy, make_model):
    """A hook on a layer that the fused path would pass over changes the result all the same."""
    model = make_model()
    before = run(model)
    seen = []
    layer = model.model.layers[1].mlp.shared_experts.gate_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(1) or 3 * output)
    assert (run(model) - before).abs().max() > 1e-3 and seen


@pytest.mark.parametrize("implementation", ["auto", "cpu", "eager"])
def test_implementation_of_experts(spy, make_model, implementation, monkeypatch):
    model = make_model(attn_implementation="sdpa")
    assert model.config._experts_implementation == "auto"
    model.set_experts_implementation(implementation)
    compiled = run(model)
    assert spy.calls.count("dsv3_step") == (implementation != "eager")
    spy.calls.clear()
    monkeypatch.setattr(decoding_dsv3, "MOST_TOKENS", 0)  # a program of a step makes the layers' calls itself
    torch.testing.assert_close(run(model), compiled, rtol=1e-4, atol=1e-5)
    # One for each layer's network and call; with "eager", a mixture's are the shared experts alone
    assert spy.calls.count("dsv3_mixture") == 2 * model.config.num_hidden_layers
    assert {"dsv3_linear", "dsv3_route", "dsv3_attention_expanded", "dsv3_attention_absorbed"} <= set(spy.calls)

    experts = []
    original = type(model.model.layers[1].mlp.experts).forward.__wrapped__
    monkeypatch.setattr(
        type(model.model.layers[1].mlp.experts).forward, "__wrapped__", lambda *a: experts.append(1) or original(*a)
    )
    spy.calls.clear()
    monkeypatch.setitem(selection.chosen, "experts", "eager")
    model.set_experts_implementation("eager")
    with selection.use(linear="torch", attention="torch"):
        plain = run(model)
    assert not spy.calls
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_rows_that_faster_units_multiply_are_left_to_them(spy, make_model, monkeypatch):
    model = make_model(attn_implementation="sdpa")
    monkeypatch.setattr(decoding_dsv3, "MOST_TOKENS", 0)
    monkeypatch.delitem(linear_cpu.MOST_ROWS, torch.float32, raising=False)
    expected = run(model)
    assert spy.calls.count("dsv3_mixture") == 2 * model.config.num_hidden_layers
    spy.calls.clear()
    # Five tokens of three experts each are two an expert, and more than four rows of the dense network
    monkeypatch.setitem(linear_cpu.MOST_ROWS, torch.float32, linear_cpu.Rows(4, 1))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert spy.calls.count("dsv3_mixture") == model.config.num_hidden_layers  # the step's


def test_training_is_not_served(spy, make_model):
    model = make_model().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert not spy.calls
    assert all(p.grad is not None for p in model.model.layers[1].mlp.experts.parameters())


def test_without_the_library_the_plain_path_serves(spy, make_model, monkeypatch):
    model = make_model(attn_implementation="sdpa")
    expected = run(model)
    called = len(spy.calls)
    assert called
    monkeypatch.setattr(cpu_library, "loaded", cpu_library._Missing())
    monkeypatch.setattr(cpu_library, "unavailable", "was not built")
    monkeypatch.setattr(selection, "epoch", selection.epoch + 1)  # what was decided with the library is decided anew
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert len(spy.calls) == called
    with pytest.raises(cpu_library.NotAvailable, match="the compiled CPU backend was not built"):
        cpu_library.loaded.dsv3_version()
    assert "was not built" in mla_cpu.absorbed_refusal(*[torch.ones(2, 2)] * 4, None)
    model.set_experts_implementation("cpu")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


IN_A_PROCESS = """
import json, torch, transformers_dsv3
from transformers_dsv3.kernels import selection
config = transformers_dsv3.Dsv3Config(
    vocab_size=9, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=0, kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
make = transformers_dsv3.Dsv3ForCausalLM._from_config
implementations = [make(config)._modules["model"].config._experts_implementation]
implementations.append(make(config, experts_implementation="grouped_mm").config._experts_implementation)
print(json.dumps([selection.chosen, implementations]))
"""


def in_a_process(value, code=IN_A_PROCESS):
    return programs.run(["-c", code], **{selection.VARIABLE: value})


def test_the_variable_replaces_the_default_but_not_an_argument():
    done = in_a_process("experts=eager,linear=torch,attention=torch,isa=portable")
    assert done.returncode == 0, done.stderr
    chosen, implementations = json.loads(done.stdout.splitlines()[-1])
    asked_for = {"experts": "eager", "linear": "torch", "attention": "torch", "isa": "portable"}
    assert chosen == {**asked_for, "pages": "huge"}
    assert implementations == ["eager", "grouped_mm"]


def test_a_bad_variable_stops_the_program():
    code = "import transformers_dsv3.kernels.selection"
    done = in_a_process("isa=mmx", code)
    assert done.returncode != 0
    assert (
        "TRANSFORMERS_DSV3_BACKENDS: isa is one of amx, avx512, avx_vnni, avx2, neon_dot, neon, portable, not 'mmx'"
        in done.stderr
    )


class TestCallsThatAreLeftToPyTorch:
    """Each gave another result, lost a gradient or raised where the plain path does not."""

    ids = torch.arange(2, 14)[None]

    def test_masks(self):
        ones = torch.ones(2, 1, 3, 4)
        assert selection.mask_refusal(None) is None
        assert selection.mask_refusal(ones) is None and selection.mask_refusal(ones.bool()) is None
        assert "int64" in selection.mask_refusal(ones.long())
        assert "(B, 1, Q, S)" in selection.mask_refusal(ones.expand(2, 5, 3, 4))
        assert "gradients" in selection.mask_refusal(ones.clone().requires_grad_())

    def test_attention_that_is_not_causal(self, make_model):
        model = make_model(attn_implementation="sdpa").eval()
        attention = model.model.layers[0].self_attn
        x, cos = torch.randn(1, 5, model.config.hidden_size), torch.ones(1, 5, attention.qk_rope_head_dim)
        with torch.no_grad():
            causal, _ = attention(x, (cos, cos))
            attention.is_causal = False
            whole, _ = attention(x, (cos, cos))
            with selection.use(attention="torch", linear="torch"):
                plain, _ = attention(x, (cos, cos))
        assert torch.allclose(whole, plain, atol=1e-5) and not torch.allclose(whole, causal, atol=1e-5)

    @pytest.mark.parametrize("name", ["mlp.gate.weight", "self_attn.q_a_proj.bias", "self_attn.o_proj.bias"])
    def test_gradients_of_a_single_tensor_in_eval_mode(self, make_model, name):
        model = make_model(attention_bias=True).eval().requires_grad_(False)
        parameter = model.get_parameter(f"model.layers.1.{name}").requires_grad_()
        model(self.ids).logits.sum().backward()
        assert parameter.grad is not None and bool(parameter.grad.any())

    def test_a_replaced_forward(self, make_model):
        model = make_model().eval()
        layer = model.model.layers[1]
        for module in (layer.self_attn.kv_a_layernorm, layer.self_attn.kv_a_proj_with_mqa, layer.mlp.experts):
            calls, original = [], module.forward
            module.forward = lambda *args, calls=calls, original=original: calls.append(1) or original(*args)
            with torch.no_grad():
                model(self.ids)
            assert calls, type(module).__name__

    def test_a_subclass_that_computes_something_else(self, make_model):
        class Doubled(torch.nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        model = make_model().eval()
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            before = model(self.ids).logits
            attention.q_b_proj.__class__ = Doubled
            assert not torch.allclose(model(self.ids).logits, before)

    def test_a_bias_where_there_is_none_otherwise(self, make_model):
        model = make_model().eval()
        layer = model.model.layers[0].self_attn.q_b_proj
        with torch.no_grad():
            before = model(self.ids).logits
            layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
            assert not torch.allclose(model(self.ids).logits, before)

    def test_transforms_of_torch_func(self, make_model):
        model = make_model(attn_implementation="sdpa").train()
        parameters = dict(model.named_parameters())

        def loss(weight):
            replaced = {**parameters, "model.norm.weight": weight}
            return torch.func.functional_call(model, replaced, (self.ids,), {"use_cache": False}).logits.sum()

        gradient = torch.func.grad(loss)(model.model.norm.weight.detach())
        assert bool(gradient.any())
