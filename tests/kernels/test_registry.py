"""`explain` names what serves a model, checked against what really runs."""

import peft
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

import transformers_dsv3
from transformers_dsv3.kernels import cpu_library, mla_cpu, mla_training
from transformers_dsv3.kernels.registry import BACKENDS
from transformers_dsv3.models.dsv3 import attention_dsv3


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
    training = (
        ["cpu_training"] if implementation == "sdpa" and mla_training.why_not(model.lm_head.weight) is None else []
    )
    used = {name for name, (used, _) in block(text, "attention, expanded").items() if used}
    assert used == {implementation, *compiled, *training}
    assert (
        {"auto"}
        < {name for name, (used, _) in block(text, "experts").items() if used}
        <= {"auto", "cpu", "grouped_cpu"}
    )
    assert [name for name, (used, _) in block(text, "attention, absorbed").items() if used] == [*compiled, "torch"]

    calls = []
    owner = mla_cpu if compiled else attention_dsv3
    original = owner.absorbed_attention
    monkeypatch.setattr(owner, "absorbed_attention", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        cache = model(torch.ones(1, 8, dtype=torch.long)).past_key_values
        assert not calls
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert len(calls) == model.config.num_hidden_layers


def test_reasons_on_a_cpu(make_model):
    text = transformers_dsv3.explain(make_model())
    assert text.startswith("Dsv3ForCausalLM on cpu, float32")
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


def test_every_backend_is_listed(make_model):
    model = make_model()
    text = transformers_dsv3.explain(model)
    for operation in dict.fromkeys(backend.operation for backend in BACKENDS):
        found = block(text, operation)
        assert list(found) == [backend.name for backend in BACKENDS if backend.operation == operation]
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
    assert transformers_dsv3.explain(wrapped).split("\n")[1:] == before


def test_dense_models_have_no_experts(make_model):
    text = transformers_dsv3.explain(make_model(first_k_dense_replace=2, num_nextn_predict_layers=0))
    assert "experts (this model has none)" in text
    assert not block(text, "experts")


def test_hooks_on_kv_b_proj_are_run(make_model, monkeypatch):
    """A hook changes what the layer computes, so decoding must go through the layer as prefill does."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert "no: kv_b_proj has forward hooks" in transformers_dsv3.explain(model)
    warnings = []
    monkeypatch.setattr(attention_dsv3.logger, "warning_once", warnings.append)
    tokens = torch.arange(1, 10)[None]
    with torch.no_grad():
        cache = model(tokens[:, :-1]).past_key_values
        assert not warnings
        decoded = model(tokens[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(decoded, model(tokens).logits[:, -1:], rtol=1e-4, atol=1e-4)
    assert "Every step expands the whole context" in warnings[0] and "forward hooks" in warnings[0]
