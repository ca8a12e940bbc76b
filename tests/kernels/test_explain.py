"""`explain` names what serves a model, checked against what really runs."""

import types

import peft
import pytest
import torch
from transformers import DeepseekV3ForCausalLM
from transformers.integrations import deepgemm, sonicmoe

import transformers_dsv3
from tests.fake_gpu import fake_gpu, on_gpu
from transformers_dsv3.compression.quantize import quantize
from transformers_dsv3.kernels import (
    experts_lora,
    explain,
    mla_flash,
    mla_training,
    public_kernels,
    selection,
    triton_support,
)
from transformers_dsv3.kernels.backends import ABSORBED
from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.models.dsv3 import attention_dsv3, decoding_dsv3


def block(text, operation):
    """The lines of one operation, as {backend: (in use, note)}."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(operation))
    found = {}
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        found[line[4:].split()[0]] = (line[2] == "*", line)
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_marked_backends_are_those_that_run(make_model, implementation, monkeypatch):
    model = make_model(attn_implementation=implementation)
    text = transformers_dsv3.explain(model)
    compiled = ["cpu"] if cpu_library.unavailable is None and implementation == "sdpa" else []
    training = []
    if implementation == "sdpa" and mla_training.tensor_refusal(model.lm_head.weight) is None:
        training = ["cpu_training"]
    used = {name for name, (used, _) in block(text, "attention, expanded").items() if used}
    assert used == {implementation, *compiled, *training}
    assert (
        {"auto"}
        < {name for name, (used, _) in block(text, "experts").items() if used}
        <= {"auto", "cpu", "grouped_cpu"}
    )
    assert [name for name, (used, _) in block(text, "attention, absorbed").items() if used] == [*compiled, "torch"]

    calls = []
    owner, name = (ABSORBED["cpu"], "undispatched") if compiled else (attention_dsv3, "absorbed_attention")
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        cache = model(torch.ones(1, 8, dtype=torch.long)).past_key_values
        assert not calls
        assert block(text, "decoding step")["program"][0] == bool(compiled)
        monkeypatch.setattr(decoding_dsv3, "MOST_TOKENS", 0)  # a program of a step attends by itself
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert len(calls) == model.config.num_hidden_layers


def test_reasons_on_a_cpu(make_model):
    text = transformers_dsv3.explain(make_model())
    assert text.startswith("DeepseekV3ForCausalLM on cpu, float32")
    assert "no: " in block(text, "attention, expanded")["flash_attention_2"][1]
    assert "no: needs a GPU" in block(text, "experts")["deepgemm"][1]
    assert 'experts_implementation="eager"' in block(text, "experts")["eager"][1]
    double = make_model().to(torch.float64)
    double.set_experts_implementation("eager")
    assert "not torch.float64" in block(transformers_dsv3.explain(double), "experts")["grouped_mm"][1]


def test_an_adapter_on_kv_b_proj_takes_the_absorbed_path_away(make_model):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["kv_b_proj"], r=2))
    used, line = block(transformers_dsv3.explain(model), "attention, absorbed")["torch"]
    assert not used and "no: kv_b_proj is a peft.tuners.lora.layer.Linear, whose weight cannot be folded" in line


def test_backends_registered_elsewhere_are_shown(make_model):
    model = make_model()
    model.config._experts_implementation = "somebody_elses"
    assert block(transformers_dsv3.explain(model), "experts")["somebody_elses"][0]


def test_other_models_are_refused(tiny_config):
    native = DeepseekV3ForCausalLM(tiny_config())
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no attention of this package"):
        transformers_dsv3.explain(native)
    with pytest.raises(ValueError, match="takes a loaded model, not './folder'"):
        transformers_dsv3.explain("./folder")


def adapted(model):
    """The model with LoRA on its routed experts."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=targets, r=2))


def test_every_backend_is_listed(make_model):
    model = adapted(make_model())
    text = transformers_dsv3.explain(model)
    for section in explain.PAGE:
        found = block(text, section.operation.name)
        assert list(found) == [backend.name for backend in section.operation.backends]
        assert any(used for used, _ in found.values())


def test_every_switch_it_names_works(make_model):
    """What is said to be possible is taken by Transformers' switch, and marked afterwards."""
    model = make_model()
    model.set_attn_implementation("sdpa")
    switches = {"attention, expanded": model.set_attn_implementation, "experts": model.set_experts_implementation}
    for operation, switch in switches.items():
        offered = [
            n for n, (_, line) in block(transformers_dsv3.explain(model), operation).items() if "chosen" in line
        ]
        assert len(offered) >= 2
        for name in offered:
            switch(name)
            assert block(transformers_dsv3.explain(model), operation)[name][0]


def test_wrapped_models_are_explained(make_model):
    model = make_model()
    before = transformers_dsv3.explain(model).split("\n")[1:]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2))
    text = transformers_dsv3.explain(wrapped)
    after = text.split("\n")[1:]
    last = next(place for place, line in enumerate(before) if line.startswith("decoding step"))
    assert after[:last] == before[:last]
    used, line = block(text, "decoding step")["program"]
    assert not used and "o_proj is a peft.tuners.lora.layer.Linear" in line or cpu_library.unavailable is not None


def test_dense_models_have_no_experts(make_model):
    text = transformers_dsv3.explain(make_model(first_k_dense_replace=2, num_nextn_predict_layers=0))
    assert "experts (this model has none)" in text
    assert not block(text, "experts")


def test_hooks_on_kv_b_proj_are_run(make_model, monkeypatch):
    """A hook changes what the layer computes, so decoding must go through the layer as prefill does."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert "no: kv_b_proj has hooks" in transformers_dsv3.explain(model)
    warnings = []
    monkeypatch.setattr(attention_dsv3.logger, "warning_once", warnings.append)
    tokens = torch.arange(1, 10)[None]
    with torch.no_grad():
        cache = model(tokens[:, :-1]).past_key_values
        assert not warnings
        decoded = model(tokens[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(decoded, model(tokens).logits[:, -1:], rtol=1e-4, atol=1e-4)
    assert "Every step expands the whole context" in warnings[0] and "has hooks" in warnings[0]


def test_adapted_experts_are_served_as_it_says(make_model, monkeypatch):
    model = adapted(make_model()).train()
    assert [
        name for name, (used, _) in block(transformers_dsv3.explain(model), "experts under LoRA").items() if used
    ] == ["cpu"]
    calls = []
    original = experts_lora._CpuExperts.apply
    monkeypatch.setattr(experts_lora._CpuExperts, "apply", lambda *a: calls.append(1) or original(*a))
    model(torch.ones(1, 4, dtype=torch.long))
    assert calls

    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            parameter.requires_grad_(True)
    found = block(transformers_dsv3.explain(model), "experts under LoRA")
    assert found["peft"][0] and "no: gate_up_proj is trained itself" in found["grouped_mm"][1]
    calls.clear()
    model(torch.ones(1, 4, dtype=torch.long))
    assert not calls


def test_adapters_elsewhere_are_not_of_the_experts(make_model):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["o_proj"], r=2))
    assert "under LoRA" not in transformers_dsv3.explain(model)


@pytest.fixture
def gpu(monkeypatch):
    """Function: from then on devices pass for NVIDIA's GPUs of a compute capability."""

    def gpu(*capability):
        for owner in (public_kernels, mla_flash):
            monkeypatch.setattr(owner, "nvidia_refusal", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(mla_flash, "_capability", lambda index: capability)

    return gpu


WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def test_what_public_kernels_need_on_a_gpu(make_model, gpu, monkeypatch):
    model = make_model(**WIDE).to(torch.bfloat16)
    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: False)
    gpu(9, 0)
    text = transformers_dsv3.explain(model)
    for operation, name in [("attention, absorbed", name) for name in mla_flash.PACKAGES] + [
        ("experts", name) for name in ("deepgemm", "sonicmoe")
    ]:
        assert 'pip install "kernels>=' in block(text, operation)[name][1]

    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: True)
    for owner in (sonicmoe, deepgemm):
        monkeypatch.setattr(owner, "is_kernels_available", lambda: True)
    text = transformers_dsv3.explain(model)
    for name in mla_flash.PACKAGES:
        choice = f"can be chosen: TRANSFORMERS_DSV3_BACKENDS=attention={name}"
        assert choice in block(text, "attention, absorbed")[name][1]
    # In the words of Transformers' own checks
    assert "nvidia-cutlass-dsl" in block(text, "experts")["sonicmoe"][1]
    assert "CUDA" in block(text, "experts")["deepgemm"][1]

    gpu(8, 0)
    text = transformers_dsv3.explain(model)
    assert "this one has 8.0" in block(text, "attention, absorbed")["flash_mla"][1]
    assert "Hopper (SM90+)" in block(text, "experts")["sonicmoe"][1]
    assert "current device is SM80" in block(text, "experts")["deepgemm"][1]
    text = transformers_dsv3.explain(model.float())
    assert "takes bfloat16 weights, not torch.float32" in block(text, "experts")["deepgemm"][1]


def test_a_model_on_a_gpu(tiny_config, monkeypatch):
    with torch.device("meta"):
        model = transformers_dsv3.Dsv3ForCausalLM(tiny_config(**WIDE)).to(torch.bfloat16)
    with fake_gpu():
        on_gpu(model)
        text = transformers_dsv3.explain(model)
        assert text.startswith("DeepseekV3ForCausalLM on cuda:0, bfloat16")
        assert "no: is for CPUs, not cuda" in block(text, "attention, absorbed")["cpu"][1]
        assert "no: is for CPUs, not cuda" in block(text, "experts")["cpu"][1]
        assert "can be chosen" in block(text, "experts")["grouped_mm"][1]
        assert "interpreted" in block(text, "attention, absorbed")["triton"][1]  # as these tests are run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_support, "interpreted", lambda: False)
            page = transformers_dsv3.explain(model)
            for operation in ("attention, absorbed", "norms"):
                assert block(page, operation)["triton"][0]
            with selection.use(attention="torch", linear="torch"):
                page = transformers_dsv3.explain(model)
                for operation in ("attention, absorbed", "norms"):
                    assert "no: " in block(page, operation)["triton"][1]
        assert 'can be chosen: generate(…, cache_implementation="static")' in block(text, "decoding step")["graph"][1]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        assert transformers_dsv3.explain(model).startswith(
            "DeepseekV3ForCausalLM on cuda:0 (NVIDIA H100 80GB HBM3), bfl"
        )


def test_attention_that_was_chosen_by_name(make_model, gpu, monkeypatch):
    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: True)
    model = make_model(**WIDE).to(torch.bfloat16)
    with selection.use(attention="flash_mla"):
        found = block(transformers_dsv3.explain(model), "attention, absorbed")
        assert not found["flash_mla"][0] and "no: needs a GPU" in found["flash_mla"][1]
        assert found["torch"][0]
        gpu(9, 0)
        found = block(transformers_dsv3.explain(model), "attention, absorbed")
        assert "in use without gradients and masks" in found["flash_mla"][1]
        assert [name for name, (used, _) in found.items() if used][0] != "flash_attention_3_mla"
        narrow = block(transformers_dsv3.explain(make_model().to(torch.bfloat16)), "attention, absorbed")
        assert "no: takes latents of 512, not 16" in narrow["flash_mla"][1]


def test_choosing_among_what_refuses_loads_nothing(make_model, gpu, monkeypatch):
    """A page of reasons is no reason to use the network, or to import packages."""
    gpu(9, 0)
    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(mla_flash, "_loaded", lambda name: pytest.fail(f"{name} was loaded"))
    for name in mla_flash.PACKAGES:
        with selection.use(attention=name):
            transformers_dsv3.explain(make_model(**WIDE).to(torch.bfloat16))


def test_experts_that_compute_themselves(make_model):
    """Quantised experts ask for no function of Transformers: what is set changes nothing."""
    model = quantize(make_model(moe_intermediate_size=32), head_bits=None)
    text = transformers_dsv3.explain(model)
    for name in ("grouped_mm", "batched_mm", "liger", "sonicmoe"):
        assert "no: QuantizedExperts computes its experts itself" in block(text, "experts")[name][1]
    model.config._experts_implementation = "grouped_mm"
    assert [n for n, (used, _) in block(transformers_dsv3.explain(model), "experts").items() if used] == ["eager"]


class Cache:
    is_compileable = True


@pytest.mark.parametrize("change", ["nothing", "quantized", "offloaded", "to disk", "forbidden"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compiled_step_is_refused_where_transformers_refuses_it(make_model, monkeypatch, change, device):
    model = make_model()
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(device)))
    if change == "quantized":
        model.hf_quantizer = types.SimpleNamespace(is_compileable=False)
    elif change == "offloaded":
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    elif change == "to disk":
        model.hf_device_map = {"": "disk"}
    elif change == "forbidden":
        model.generation_config.disable_compile = True
    theirs = model._valid_auto_compile_criteria({"past_key_values": Cache()}, model.generation_config)
    note = block(transformers_dsv3.explain(model), "decoding step")["graph"][1]
    assert ("no: " not in note) == theirs == (device == "cuda" and change == "nothing")
    if theirs:
        assert 'cache_implementation="static"' in note
        model.generation_config.cache_implementation = "static"
        assert block(transformers_dsv3.explain(model), "decoding step")["graph"][0]
