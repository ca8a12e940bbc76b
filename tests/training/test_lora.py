"""LoRA by PEFT's own calls: where names land, what experts compute, saving, merging, loading, budgets."""

import json
import shutil
import sys

import pytest
import torch
from accelerate import cpu_offload
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

import transformers_dsv3
from transformers_dsv3.kernels import backends
from transformers_dsv3.models.dsv3 import moe_dsv3
from transformers_dsv3.training.lora import lora_config
from transformers_dsv3.training.lora_export import export_per_expert


ROUTED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
TOKENS = torch.arange(24).view(2, 12) % 96


@pytest.fixture
def model(make_model):
    """Three layers, the first dense, and an MTP layer."""
    return make_model(num_hidden_layers=3)


def adapted(model, dtype=torch.float32, seed=0, **options):
    """A PEFT model with weights in its adapter that matter."""
    options = {"r": 3, "lora_alpha": 5, **options}
    torch.manual_seed(seed)
    wrapped = get_peft_model(model.to(dtype), LoraConfig(**options))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.2)
    return wrapped


def places(wrapped):
    """Names of what is adapted: layers, and experts by their number of wrappers."""
    names = [n.split(".lora_A")[0] for n, _ in wrapped.named_parameters() if ".lora_A." in n]
    return sorted(name.removeprefix("base_model.model.model.layers.") for name in names)


def mlp(*projections, dense=True, shared=True, routed=True):
    names = [f"0.mlp.{p}" for p in projections if dense]
    names += [f"{layer}.mlp.shared_experts.{p}" for layer in (1, 2) for p in projections if shared]
    if routed:
        names += [f"{layer}.mlp.experts" for layer in (1, 2)]
        if {"gate_proj", "down_proj"} <= set(projections):
            names += [f"{layer}.mlp.experts.base_layer" for layer in (1, 2)]
    return names


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
EVERY_ATTENTION = [f"{layer}.self_attn.{p}" for layer in range(3) for p in ATTENTION]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [*EVERY_ATTENTION, *mlp(*GATE_UP_DOWN)]),
        (list(GATE_UP_DOWN), mlp(*GATE_UP_DOWN)),
        (["shared_experts.gate_proj"], mlp("gate_proj", dense=False, routed=False)),
        (["mlp.down_proj"], mlp("down_proj", shared=False, routed=False)),
        (["down_proj"], mlp("down_proj")),
        (["experts.gate_proj", "experts.up_proj"], mlp("gate_proj", "up_proj", dense=False, shared=False)),
        (r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj", mlp(*GATE_UP_DOWN, dense=False, shared=False)),
        (r".*mlp.*_proj", mlp(*GATE_UP_DOWN)),
        (r".*shared_experts.*", mlp(*GATE_UP_DOWN, dense=False, routed=False)),
        (["o_proj", "kv_b_proj"], [f"{layer}.self_attn.{p}" for layer in range(3) for p in ("o_proj", "kv_b_proj")]),
        (["model.layers.1.self_attn.o_proj"], ["1.self_attn.o_proj"]),
        (["gate"], ["1.mlp.gate", "2.mlp.gate"]),
        (
            ["model.layers.3.self_attn.o_proj"],
            ["base_model.model.model.mtp.0.self_attn.o_proj"],
        ),  # MTP, by the full name
    ],
)
@pytest.mark.parametrize("mtp", [1, 0])
def test_names_hit_what_they_say(targets, expected, mtp, make_model, tmp_path, recwarn):
    if not mtp and "mtp." in expected[0]:
        pytest.skip("without an MTP layer there is no fourth")
    fields = {"num_hidden_layers": 3, "num_nextn_predict_layers": mtp}
    wrapped = adapted(make_model(**fields), target_modules=targets)
    assert places(wrapped) == sorted(expected)
    assert not [w for w in recwarn if "did not match any targeted module" in str(w.message)]
    # What is saved lands on the same places again
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(**fields), tmp_path)
    assert places(again) == sorted(expected)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, wrapped.eval()(TOKENS).logits)


def test_layers_to_transform_and_exclusions(model):
    targets = [*ATTENTION, *GATE_UP_DOWN]
    wrapped = adapted(model, target_modules=targets, layers_to_transform=[1], exclude_modules=["kv_b_proj"])
    attention = [f"1.self_attn.{p}" for p in ATTENTION if p != "kv_b_proj"]
    assert places(wrapped) == sorted([*attention, *(n for n in mlp(*GATE_UP_DOWN) if n.startswith("1."))])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["experts.3.gate_proj", "experts.3.up_proj"],
            r"some of a layer's routed experts.*experts\.3\.gate",
        ),
        (["gate_proj"], r"experts\.gate_proj without its other half"),
        (["nowhere"], "not found in the base model"),
    ],
)
def test_names_that_cannot_be_placed(targets, message, model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(target_modules=targets))
    assert before.keys() == model.state_dict().keys()


def test_names_of_other_models_are_said(model, caplog):
    wrapped = adapted(model, target_modules=["q_proj", "k_proj", "o_proj"])
    assert places(wrapped) == [f"{layer}.self_attn.o_proj" for layer in range(3)]
    assert "this model has no k_proj, q_proj" in caplog.text


def test_other_models_and_unregistering():
    fields = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    wrapped = get_peft_model(
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **fields)), LoraConfig(target_modules="all-linear")
    )
    assert isinstance(wrapped.base_model, LoraModel) and len(places(wrapped)) == 7
    transformers_dsv3.unregister()
    try:
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
    finally:
        transformers_dsv3.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is not LoraModel


def losses_and_gradients(wrapped):
    wrapped.zero_grad()
    output = wrapped(TOKENS, labels=TOKENS, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients


@pytest.mark.parametrize("parameters", [ROUTED, ROUTED[:1], ROUTED[1:]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_expert_gradients_are_those_of_peft(parameters, checkpointing, model, monkeypatch):
    wrapped = adapted(model, torch.float64, target_modules=[], target_parameters=parameters).train()
    if checkpointing:
        wrapped.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
    taken = []
    backend = backends.ADAPTED["cpu"]
    serve = backend.function
    monkeypatch.setattr(backend, "function", lambda *a: taken.append(1) or serve(*a))
    loss, logits, gradients = losses_and_gradients(wrapped)
    assert taken
    monkeypatch.setattr(moe_dsv3, "adapted_experts", lambda module: None)  # PEFT's own forward
    taken.clear()
    peft_loss, peft_logits, peft_gradients = losses_and_gradients(wrapped)
    assert not taken and gradients.keys() == peft_gradients.keys() and len(gradients) == 4 * len(parameters)
    torch.testing.assert_close(loss, peft_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits, peft_logits, rtol=1e-10, atol=1e-10)
    for name, gradient in peft_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_several_adapters_switched_off_and_merged(model, monkeypatch):
    base = model.double()(TOKENS).logits
    wrapped = adapted(model, torch.float64, target_modules=[], target_parameters=ROUTED).eval()
    wrapped.add_adapter("other", LoraConfig(r=2, target_parameters=ROUTED, target_modules=[], init_lora_weights=False))
    seen = {}
    for active in (["default"], ["other"], ["default", "other"]):
        wrapped.base_model.set_adapter(active)
        seen[tuple(active)] = wrapped(TOKENS).logits
    with monkeypatch.context() as patch:
        patch.setattr(moe_dsv3, "adapted_experts", lambda module: None)
        for active, logits in seen.items():
            wrapped.base_model.set_adapter(list(active))
            torch.testing.assert_close(logits, wrapped(TOKENS).logits, rtol=1e-8, atol=1e-8)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(TOKENS).logits, base)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(TOKENS).logits, seen["default", "other"], rtol=1e-8, atol=1e-8)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(wrapped(TOKENS).logits, seen["default", "other"], rtol=1e-8, atol=1e-8)


def test_trained_base_weights_get_their_gradients(model):
    """Beside trained experts, PEFT's own forward serves, which has the base weights' gradients."""
    wrapped = adapted(model, target_modules=[], target_parameters=ROUTED).train()
    experts = wrapped.base_model.model.model.layers[1].mlp.experts.base_layer.base_layer
    experts.gate_up_proj.requires_grad_(True)
    _, _, gradients = losses_and_gradients(wrapped)
    assert any(name.endswith("gate_up_proj") and gradient.any() for name, gradient in gradients.items())


def test_merged_checkpoint_is_official(model, tmp_path):
    wrapped = adapted(model, target_modules="all-linear").eval()
    tokens = TOKENS[:1, :8]
    with torch.no_grad():
        expected = wrapped(TOKENS).logits
        text = wrapped.generate(tokens, max_new_tokens=8, do_sample=False)
        merged = wrapped.merge_and_unload()
        assert (merged(TOKENS).logits - expected).norm() <= 1e-5 * expected.norm()
        merged.save_pretrained(tmp_path)
        native = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
        assert (native(TOKENS).logits - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(merged.generate(tokens, max_new_tokens=8, do_sample=False), text)


def test_attention_and_expert_adapters_open_natively(model, native_twin, tmp_path):
    native = native_twin(model).eval()
    wrapped = adapted(model, target_modules=["o_proj", "kv_b_proj"], target_parameters=ROUTED).eval()
    wrapped.save_pretrained(tmp_path)
    transformers_dsv3.unregister()
    try:
        opened = PeftModel.from_pretrained(native, tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(opened(TOKENS).logits, wrapped(TOKENS).logits, rtol=1e-4, atol=1e-4)
    finally:
        transformers_dsv3.register()


def per_expert_adapter(model, folder, rank=2):
    """An adapter as Transformers 4 and servers have it: projections of each expert by name, of other MLPs too."""
    torch.manual_seed(0)
    weights = {}
    for name, weight in model.state_dict().items():
        if ".mtp." in name:
            continue
        parts = {}
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
            stem, stack = name.rsplit(".", 1)
            for e in range(model.config.n_routed_experts):
                halves = {"gate_proj": weight[e].chunk(2)[0], "up_proj": weight[e].chunk(2)[1]}
                for p, w in halves.items() if stack == "gate_up_proj" else {"down_proj": weight[e]}.items():
                    parts[f"{stem}.{e}.{p}"] = w
        elif any(name.endswith(f"{p}.weight") for p in (*GATE_UP_DOWN, "o_proj")):
            parts[name.removesuffix(".weight")] = weight
        for part, w in parts.items():
            a, b = 0.3 * torch.randn(rank, w.shape[1]), 0.3 * torch.randn(w.shape[0], rank)
            weights[f"base_model.model.{part}.lora_A.weight"] = a
            weights[f"base_model.model.{part}.lora_B.weight"] = b
            w += 2 * b @ a
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*GATE_UP_DOWN, "o_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(folder)


def test_per_expert_adapters_land_whole(make_model, tmp_path):
    fields = {"num_hidden_layers": 3}
    expected = make_model(**fields)
    per_expert_adapter(expected, tmp_path / "adapter")  # adds it to the weights by hand
    opened = PeftModel.from_pretrained(make_model(**fields), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"target_modules": "all-linear"}, {"target_parameters": ROUTED, "target_modules": ["o_proj"]}]
)
def test_export_per_expert(options, make_model, tmp_path):
    fields = {"num_hidden_layers": 3}
    wrapped = adapted(make_model(**fields), **options).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    export_per_expert(tmp_path / "adapter", tmp_path / "apart", 8)
    weights = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    rank = 6 if options["target_modules"] == "all-linear" else 3
    assert weights["base_model.model.model.layers.2.mlp.experts.7.up_proj.lora_A.weight"].shape == (rank, 32)
    opened = PeftModel.from_pretrained(make_model(**fields), tmp_path / "apart").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, wrapped(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_export_refuses(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        export_per_expert(tmp_path, tmp_path / "out", 8)
    adapted(make_model(), target_modules=["o_proj"]).save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match="does not adapt routed experts"):
        export_per_expert(tmp_path / "attention", tmp_path / "out", 8)
    adapted(make_model(), target_modules=[], target_parameters=ROUTED).save_pretrained(tmp_path / "routed")
    with pytest.raises(ValueError, match="no whole rank for 7 experts"):
        export_per_expert(tmp_path / "routed", tmp_path / "out", 7)
    with pytest.raises(FileExistsError):
        export_per_expert(tmp_path / "routed", tmp_path / "attention", 8)
    assert not (tmp_path / "out").exists()


def change(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["stacked", "per expert"])
def test_adapters_that_do_not_fit_are_refused(kind, make_model, tmp_path):
    folder = tmp_path / "adapter"
    if kind == "stacked":
        adapted(make_model(), target_modules=["o_proj"], target_parameters=ROUTED).save_pretrained(folder)
    else:
        per_expert_adapter(make_model(), folder)
    with pytest.raises(RuntimeError, match="(?s)another number of experts.*size mismatch"):
        PeftModel.from_pretrained(make_model(n_routed_experts=4, n_group=1), folder)
    shutil.copytree(folder, tmp_path / "more")
    name = "base_model.model.model.layers.{}.self_attn.o_proj.lora_A.weight"
    change(tmp_path / "more", lambda w: w.update({name.format(9): w[name.format(1)].clone()}))
    with pytest.raises(ValueError, match=r"does not adapt or have: .*layers\.9\.self_attn\.o_proj"):
        PeftModel.from_pretrained(make_model(), tmp_path / "more")
    change(folder, lambda w: [w.pop(n) for n in list(w) if "layers.1.self_attn.o_proj" in n])
    with pytest.raises(ValueError, match=r"lacks weights of model\.layers\.1\.self_attn\.o_proj"):
        PeftModel.from_pretrained(make_model(), folder)


def test_transformers_own_adapter_calls(model, make_model, tmp_path):
    """`model.add_adapter` and `model.load_adapter`, without a `PeftModel`."""
    config = LoraConfig(target_modules=["shared_experts.gate_proj"], init_lora_weights=False)
    config.target_parameters = ROUTED
    model.add_adapter(config)
    model.save_pretrained(tmp_path)
    other = make_model(num_hidden_layers=3)
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)


WHERE = ["attention", "dense", "shared_experts", "experts", "linear", "mlp", "all", ("attention", "experts"), "auto"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_budgets_are_kept_and_used(where, budget, model, capsys):
    total = sum(p.numel() for p in model.parameters())
    try:
        config = lora_config(model, budget=budget, where=where)
    except ValueError as error:
        assert budget == 0.02 and {"experts", "mlp", "all"} & {*([where] if isinstance(where, str) else where)}
        assert "too small for rank 1" in str(error)
        return
    said = capsys.readouterr().out
    wrapped = get_peft_model(model, config)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trainable <= budget * total < trainable / config.r * (config.r + 1)
    assert f"rank {config.r}" in said and f"{trainable:,}" in said
    assert not any(name.startswith("3.") for name in places(wrapped))


def test_ranks_and_options(model):
    config = lora_config(model, rank=4, where="attention", lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 8, 0.1, "CAUSAL_LM")
    assert places(get_peft_model(model, config)) == sorted(EVERY_ATTENTION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of budget"),
        ({"budget": 0.1, "rank": 2}, "one of budget"),
        ({"budget": 1.5}, "between 0 and 1"),
        ({"rank": 0}, "whole number"),
        ({"budget": 1e-5}, "too small for rank 1 on attention"),
        ({"budget": 0.01, "where": "experts"}, r"too small for rank 1 on experts\. Rank 1 takes: attention \d"),
        ({"rank": 2, "where": "everything"}, "none of auto, attention"),
    ],
)
def test_lora_config_refuses(options, message, model):
    with pytest.raises(ValueError, match=message):
        lora_config(model, **options)


def test_lora_config_refuses_models(make_model):
    with pytest.raises(ValueError, match="has none of it"):
        lora_config(make_model(first_k_dense_replace=2), rank=2, where="experts")
    with pytest.raises(ValueError, match="adapters already"):
        lora_config(adapted(make_model(), target_modules=["o_proj"]).base_model.model, rank=2)


def test_saved_config_names_layers_by_their_ends(make_model, tmp_path):
    adapted(make_model(num_nextn_predict_layers=0), target_modules="all-linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"mlp.gate_proj", "shared_experts.gate_proj", "self_attn.o_proj"} <= set(config["target_modules"])
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_the_base_model_opens_with_its_adapter(make_model, tmp_path):
    """`AutoModelForCausalLM.from_pretrained(adapter_folder)`, as `pipeline` does."""
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules="all-linear")
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, wrapped.eval()(TOKENS).logits)


def deltas(model, folder):
    """What an adapter adds to each weight, by name, as PEFT merges it."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    opened = PeftModel.from_pretrained(model, folder)
    after = opened.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def test_hooked_and_offloaded_experts_are_left_to_peft(make_model):
    model = make_model()
    seen = []
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    adapted(model, target_modules=[], target_parameters=ROUTED).eval()(TOKENS)
    assert seen
    offloaded = cpu_offload(adapted(make_model(), target_modules=[], target_parameters=ROUTED).eval(), "cpu")
    with pytest.raises(RuntimeError):  # PEFT's own, in place of wrong results
        offloaded(TOKENS)


def test_adapters_of_other_parameters_are_refused_beside_the_first(model):
    wrapped = adapted(model, target_modules=[], target_parameters=ROUTED[:1])
    for options in ({"target_modules": [], "target_parameters": ROUTED}, {"target_modules": "all-linear"}):
        with pytest.raises(ValueError, match="must target the same set of"):
            wrapped.add_adapter("other", LoraConfig(**options))


def test_a_refused_config_stays_as_it_was(model):
    wrapped = adapted(model, target_modules=["o_proj"], bias="all")
    config = LoraConfig(target_modules=["kv_b_proj"], bias="all")
    with pytest.raises(ValueError, match="bias"):
        wrapped.add_adapter("other", config)
    assert config.target_modules == {"kv_b_proj"}
    with pytest.raises(ValueError, match="nowhere"):
        wrapped.add_adapter("third", LoraConfig(target_modules=["nowhere"]))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_per_expert_adapters_keep_their_scale(use_rslora, make_model, tmp_path):
    expected = make_model()
    before = {name: weight.clone() for name, weight in expected.state_dict().items()}
    per_expert_adapter(expected, tmp_path / "adapter", rank=4)  # alpha 8, so a scale of 2; 4 with rslora
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": use_rslora}))
    seen = deltas(make_model(), tmp_path / "adapter")
    assert any("experts.gate_up_proj" in name for name in seen)
    for name, delta in seen.items():
        by_hand = expected.state_dict()[name] - before[name]
        torch.testing.assert_close(delta, by_hand * (2 if use_rslora else 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": ["gate_up_proj"]},
        {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj", "mlp.gate.weight"]},
        {"target_modules": "all-linear", "rank_pattern": {"experts.gate_up_proj": 2, "down_proj": 5}},
        {"target_modules": "all-linear", "alpha_pattern": {".*experts.*": 7}},
    ],
)
def test_export_keeps_function_and_ranks(options, use_rslora, make_model, tmp_path):
    wrapped = adapted(make_model(), use_rslora=use_rslora, **options).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    export_per_expert(tmp_path / "adapter", tmp_path / "apart", 8)
    for folder in ("adapter", "apart"):
        opened = PeftModel.from_pretrained(make_model(), tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(opened(TOKENS).logits, wrapped(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_many_names_are_read_back_as_they_were_meant(make_model, tmp_path):
    """PEFT shortens lists of 20 names and more by what modules there are, among which routed experts are not."""
    fields = {"num_hidden_layers": 12, "num_nextn_predict_layers": 0}
    excluded = ["model.layers.0.self_attn.o_proj"]
    targets = ["o_proj", "mlp.gate_proj", "shared_experts.gate_proj"]
    wrapped = adapted(make_model(**fields), target_modules=targets, exclude_modules=excluded)
    wrapped.save_pretrained(tmp_path)
    assert places(PeftModel.from_pretrained(make_model(**fields), tmp_path)) == places(wrapped)
    assert not any("mlp.experts" in name for name in places(wrapped))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w, name: w.update({name.format(9): w[name.format(1)].clone()}), r"does not adapt or have.*layers\.9"),
        (lambda w, name: w.pop(name.format(1)), r"lacks weights of .*layers\.1\.self_attn\.o_proj"),
    ],
)
def test_transformers_own_loader_refuses_too(edit, message, make_model, tmp_path):
    adapted(make_model(), target_modules=["o_proj"]).save_pretrained(tmp_path)
    change(tmp_path, lambda weights: edit(weights, "base_model.model.model.layers.{}.self_attn.o_proj.lora_A.weight"))
    with pytest.raises(ValueError, match=message):
        make_model().load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "excluded",
    [["experts"], ["mlp.experts"], r".*\.experts", r".*\.experts\..*", ["gate_up_proj", "experts.down_proj"]],
)
def test_routed_experts_are_excluded(excluded, model):
    wrapped = adapted(model, target_modules="all-linear", exclude_modules=excluded)
    assert places(wrapped) == sorted([*EVERY_ATTENTION, *mlp(*GATE_UP_DOWN, routed=False)])


@pytest.mark.parametrize("excluded", [["experts.3.gate_proj"], r".*experts\.3\..*"])
def test_some_experts_cannot_be_excluded(excluded, model):
    with pytest.raises(
        ValueError, match=r"name or exclude some of a layer's routed experts, such as .*experts\.3\.gate"
    ):
        adapted(model, target_modules="all-linear", exclude_modules=excluded)


def ranks_and_scales(wrapped):
    """Of layer 1: down and gate_up of the routed experts, and a shared expert's gate."""
    block = wrapped.base_model.model.model.layers[1].mlp
    layers = (block.experts, block.experts.base_layer, block.shared_experts.gate_proj)
    return [(layer.r["default"], layer.scaling["default"]) for layer in layers]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(8, 2), (16, 2), (8, 2)]),
        ({"rank_pattern": {"experts.gate_up_proj": 4}}, [(8, 2), (4, 4), (8, 2)]),
        ({"rank_pattern": {"gate_proj": 4, "up_proj": 4, "down_proj": 4}}, [(4, 4), (8, 4), (4, 4)]),
        ({"alpha_pattern": {"gate_proj": 32, "up_proj": 32, "down_proj": 32}}, [(8, 4), (16, 4), (8, 4)]),
        ({"rank_pattern": {r".*experts\.\d+\.(gate|up|down)_proj": 2}}, [(2, 8), (4, 8), (8, 2)]),
    ],
)
def test_patterns_of_rank_and_alpha(options, expected, model, recwarn):
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, **options))
    assert ranks_and_scales(wrapped) == expected
    wrapped.add_adapter("other", LoraConfig(target_modules="all-linear", r=2))
    assert not [w for w in recwarn if "did not match any targeted module" in str(w.message)]


def test_gates_and_ups_have_one_rank(model):
    with pytest.raises(ValueError, match="rank_pattern: gates and ups of routed experts are one parameter"):
        adapted(model, target_modules="all-linear", rank_pattern={"gate_proj": 4})


def test_missing_parameters_are_said(model, caplog):
    adapted(model, target_modules=[], target_parameters=[ROUTED[0], "mlp.experts.down_prj"])
    assert "target_parameters: this model has no mlp.experts.down_prj" in caplog.text


@pytest.mark.parametrize("name", ["model", "self_attn"])
def test_names_of_adapters(name, make_model, tmp_path):
    wrapped = adapted(make_model(), target_modules=["o_proj"])
    wrapped.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(make_model(), tmp_path)
    opened.load_adapter(str(tmp_path), name)
    assert name in opened.peft_config


def test_classification_heads_are_trained_beside(make_model):
    model = make_model(cls=transformers_dsv3.Dsv3ForSequenceClassification, num_labels=2)
    wrapped = get_peft_model(model, lora_config(model, rank=2, where="attention"))
    assert any("score" in name for name, weight in wrapped.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "where": []}, "where is empty"),
        ({"rank": 2, "where": None}, "where is empty"),
        ({"rank": 2, "r": 3}, "lora_config chooses r"),
        ({"budget": 0.1, "target_modules": ["o_proj"]}, "lora_config chooses target_modules"),
        ({"budget": 0.1, "rank_pattern": {}}, "lora_config chooses rank_pattern"),
    ],
)
def test_lora_config_refuses_what_it_chooses(options, message, model):
    with pytest.raises(ValueError, match=message):
        lora_config(model, **options)


def test_lora_config_without_peft(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        lora_config(model, rank=2)


def test_the_head_takes_what_is_left_of_a_budget(model):
    total = sum(p.numel() for p in model.parameters())
    config = lora_config(model, budget=0.05, where=["attention", "head"])
    wrapped = get_peft_model(model, config)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trainable <= 0.05 * total < trainable + 32 + 96 and config.rank_pattern["lm_head"] > config.r
    assert wrapped.base_model.model.lm_head.scaling["default"] == 2
