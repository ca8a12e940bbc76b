"""Every tuner that PEFT has, on the plugin's model and on native's with PEFT's own tuners: the same files and results.

Native's model has no MTP layers; the plugin's has one here, which no tuner may touch.
"""

import contextlib
import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import _LoraFactorsProxy
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM as NativeForCausalLM

import transformers_dsv3
from transformers_dsv3.kernels import backends
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


FIELDS = {"num_hidden_layers": 3, "q_lora_rank": 16, "v_head_dim": 16}  # powers of two, as block-wise tuners need
OFFICIAL = "transformers.models.deepseek_v3.modeling_deepseek_v3"
TOKENS = torch.arange(2, 26).view(2, 12)
LAYERS = ["q_a_proj", "kv_a_proj_with_mqa", "o_proj", "shared_experts.up_proj"]
# LoRA alone takes names of MLPs for routed experts on native, see test_lora.py
OF_LORA = LAYERS[:3]
UP = ["q_b_proj", "kv_b_proj"]  # native calls the second one on four dimensions, which some do not take
# What configs do not have by default, or have for larger layers
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [0, 1], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "MISS": {"r": 4},
    "POLY": {"task_type": "CAUSAL_LM"},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "model.norm"]},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [2, 3, 5]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
}


def make_config(kind, targets):
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = {}
    if "target_modules" in config_class.__dataclass_fields__:
        options["target_modules"] = targets
    else:
        options["task_type"] = "CAUSAL_LM"  # prompts have to have one
    if "num_virtual_tokens" in config_class.__dataclass_fields__:
        options["num_virtual_tokens"] = 3
    return config_class(**{**options, **OPTIONS.get(kind.value, {})})


TASKS = {PeftType.MULTITASK_PROMPT_TUNING: [0, 1], PeftType.POLY: [0, 0]}
RANDOM = (PeftType.SHADOW,)  # a model of its own, which starts at random each time


@contextlib.contextmanager
def plain_peft():
    """PEFT's own tuners, as in a process that has not imported the plugin."""
    transformers_dsv3.unregister()
    try:
        yield
    finally:
        transformers_dsv3.register()


@pytest.fixture(scope="module")
def pair(make_model, native_twin):
    """Function to a fresh model of the plugin and native's of the same weights."""
    model = make_model(**FIELDS)
    twin = native_twin(model)
    return lambda: (copy.deepcopy(model), copy.deepcopy(twin))


def shake(model):
    """Gives an adapter's weights values that matter: many start as zero. Relative, since some are indices or masks."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.requires_grad and weight.is_floating_point():
                weight.add_(0.05 * torch.randn_like(weight))


def task_options(kind):
    return {"task_ids": torch.tensor(TASKS[kind])} if kind in TASKS else {}


def life(model, config, folder):
    """What becomes of an adapter from its making to its loading: stage by stage, what can be compared."""
    fresh, seen = copy.deepcopy(model), {}
    options = task_options(config.peft_type)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    shake(wrapped)
    wrapped.eval()  # dropouts
    loss = wrapped(input_ids=TOKENS, labels=TOKENS, **options).loss
    loss.backward()
    seen["loss"] = loss.detach()
    seen["gradients"] = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.save_pretrained(folder)
    seen["files"] = sorted(path.name for path in folder.iterdir())
    seen["tensors"] = load_file(folder / "adapter_model.safetensors")
    seen["config"] = json.loads((folder / "adapter_config.json").read_text())
    with torch.no_grad():
        seen["logits"] = wrapped(input_ids=TOKENS, **options).logits
    return {**seen, **opened(fresh, folder, options)}


def opened(model, folder, options):
    """What an adapter does once it is loaded."""
    wrapped = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        seen = {"opened": wrapped(input_ids=TOKENS, **options).logits}
        if not options:
            seen["text"] = wrapped.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return seen


def same(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            same(ours[name], value)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, equal_nan=True)
    elif isinstance(theirs, list):
        assert sorted(map(str, ours)) == sorted(map(str, theirs))
    else:
        assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [LAYERS, UP], ids=["layers", "up"])
@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING), ids=lambda kind: kind.value)
def test_every_tuner_as_on_native(kind, targets, pair, tmp_path):
    config = make_config(kind, OF_LORA if kind == PeftType.LORA and targets is LAYERS else targets)
    if targets is UP and set(getattr(config, "target_modules", None) or []) != set(UP):
        pytest.skip("adapts no layers by these names")
    ours, native = pair()
    try:
        with plain_peft():
            expected = life(native, copy.deepcopy(config), tmp_path / "native")
    except Exception as error:
        pytest.skip(f"native fails: {type(error).__name__}: {str(error)[:100]}")
    seen = life(copy.deepcopy(ours), config, tmp_path / "ours")
    if kind in RANDOM:
        for name in ("gradients", "tensors"):
            assert seen[name].keys() == expected[name].keys()
        same(seen["config"], expected["config"])
        same(seen["opened"], seen["logits"])
    else:
        same(seen, expected)
    same(opened(ours, tmp_path / "native", task_options(kind))["opened"], expected["opened"])


def test_xlora_mixes_adapters_as_on_native(pair, tmp_path):
    ours, native = pair()
    for number in range(2):
        torch.manual_seed(number)
        config = LoraConfig(target_modules=["o_proj", "q_b_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(copy.deepcopy(ours), config).save_pretrained(tmp_path / str(number))

    def life_of(model, folder):
        model.config.use_cache = False
        fresh = copy.deepcopy(model)
        adapters = {str(number): str(tmp_path / str(number)) for number in range(2)}
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, xlora_size=8, adapters=adapters, enable_softmax=True
        )
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config).eval()
        wrapped.save_pretrained(folder)
        opened = PeftModel.from_pretrained(fresh, folder, adapters=adapters).eval()
        return {"made": wrapped(TOKENS).logits, "opened": opened(TOKENS).logits}

    with torch.no_grad():
        with plain_peft():
            expected = life_of(native, tmp_path / "native")
        same(life_of(ours, tmp_path / "ours"), expected)


def test_most_tuners_are_compared():
    """So that the test above does not skip what it is for: PEFT had 46 tuners when it was written."""
    assert len(PEFT_TYPE_TO_CONFIG_MAPPING) >= 40
    assert {"GLORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "ADALORA", "VERA"} <= set(PEFT_TYPE_TO_CONFIG_MAPPING)
    unlike = {kind for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if not tuner.__module__.startswith("trans")}
    assert not unlike, "tuners that were added behind the plugin's back"


def auto_mapping(folder):
    return json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]


@pytest.mark.parametrize("cls", ["DeepseekV3ForCausalLM", "DeepseekV3Model", "DeepseekV3ForSequenceClassification"])
def test_saved_adapters_name_the_official_class(cls, make_model, tmp_path):
    model = make_model(cls=getattr(transformers_dsv3.models.dsv3, cls))
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    kept = copy.deepcopy(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert auto_mapping(tmp_path / "adapter") == {"base_model_class": cls, "parent_library": OFFICIAL}
    assert "dsv3" not in (tmp_path / "adapter" / "adapter_config.json").read_text().replace(str(tmp_path), "")
    # Neither the config nor the model is bound to what was saved
    assert type(wrapped.peft_config["default"]) is LoraConfig and wrapped.peft_config["default"].auto_mapping is None
    copies = {"deep copy": copy.deepcopy(wrapped), "of before": kept, "pickled": pickle.loads(pickle.dumps(wrapped))}
    for name, other in copies.items():
        other.save_pretrained(tmp_path / name)
        assert auto_mapping(tmp_path / name) == auto_mapping(tmp_path / "adapter")
    if cls == "DeepseekV3ForCausalLM":
        opened = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(opened(TOKENS).logits, wrapped.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_prompts_without_a_task_name_the_official_class(make_model, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2)
    PeftModel(make_model(), config).save_pretrained(tmp_path)
    assert auto_mapping(tmp_path)["parent_library"] == OFFICIAL


def test_own_classes_of_users_stay_their_own(make_model, tmp_path):
    class Mine(transformers_dsv3.DeepseekV3ForCausalLM):
        pass

    get_peft_model(make_model(cls=Mine), LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path)
    assert auto_mapping(tmp_path) == {"base_model_class": "Mine", "parent_library": __name__}


def test_every_linear_layer_opens_by_the_official_class(make_model, tmp_path):
    """On native's class, in a process with the plugin: its names mean what they say there too."""
    model = make_model(num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(opened.get_base_model()) is NativeForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, wrapped(TOKENS).logits, rtol=1e-4, atol=1e-4)


def saved(model, folder, **options):
    """Names of what is saved, the config, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    messages = sorted(str(w.message) for w in said if w.category is UserWarning)
    targets = config["target_modules"]  # a set, in whatever order it was in memory
    targets = sorted(targets) if isinstance(targets, list) else targets
    return load_file(folder / "adapter_model.safetensors").keys(), targets, messages


@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
@pytest.mark.parametrize(
    "targets",
    [["embed_tokens", "o_proj"], ["lm_head"], ["lin0", "embed_tokens"], r".*\.embed_tokens", ["model.embed_tokens"]],
)
def test_embeddings_are_saved_as_on_native(targets, save_embedding_layers, pair, tmp_path):
    ours, native = pair()
    options = {"save_embedding_layers": save_embedding_layers}
    with plain_peft():
        expected = saved(get_peft_model(native, LoraConfig(target_modules=targets)), tmp_path / "native", **options)
    wrapped = get_peft_model(ours, LoraConfig(target_modules=targets))
    same(list(saved(wrapped, tmp_path / "ours", **options)), list(expected))
    again = saved(PeftModel.from_pretrained(pair()[0], tmp_path / "ours"), tmp_path / "again", **options)
    same(list(again), list(expected))


@pytest.mark.parametrize(
    "targets", [["o_proj"], ["q_a_proj", "kv_b_proj"], ["experts.gate_up_proj"], ["model.layers.1.self_attn.o_proj"]]
)
def test_configs_keep_the_names_that_were_given(targets, pair):
    parameters = [name for name in targets if "experts" in name]
    modules = [name for name in targets if "experts" not in name]
    config = LoraConfig(target_modules=modules, target_parameters=parameters or None)
    get_peft_model(pair()[0], config)
    assert config.target_modules == set(modules) and config.target_parameters == parameters


def test_layers_that_peft_repeats_are_adapted(pair):
    """`layer_replication` makes a deeper model before names are looked for in it."""
    names, logits = [], []
    for model, own in zip(pair(), (True, False)):
        model.config.num_nextn_predict_layers = 0
        config = LoraConfig(target_modules=["o_proj", "kv_a_proj_with_mqa"], layer_replication=[[0, 3], [1, 3]])
        with contextlib.nullcontext() if own else plain_peft():
            wrapped = get_peft_model(model, config)
        torch.manual_seed(1)
        for name, weight in sorted(wrapped.named_parameters()):
            if ".lora_" in name:
                weight.data.normal_(0, 0.1)
        names.append(sorted(name for name, _ in wrapped.named_parameters() if ".lora_" in name))
        with torch.no_grad():
            logits.append(wrapped.eval()(TOKENS, use_cache=False).logits)
    assert names[0] == names[1] and any("layers.4." in name for name in names[0])
    same(*logits)


def test_a_second_adapter_beside_the_first(pair, tmp_path):
    """Transformers' own `load_adapter` lists what earlier adapters have as missing."""
    model = pair()[0]
    for name in ("one", "two"):
        source = pair()[0]
        source.add_adapter(LoraConfig(target_modules=["o_proj"], r=2))
        shake(source)
        source.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, adapter_name=name)
    assert model.active_adapters() == ["two"]
    model.set_adapter(["one", "two"])
    model.eval()(TOKENS)
    weights = load_file(tmp_path / "two" / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, tmp_path / "two" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights of"):
        model.load_adapter(tmp_path / "two", adapter_name="three")


def test_tuners_have_the_names_of_pefts(pair):
    """By which programs look for them."""
    wrapped = get_peft_model(pair()[0], LoraConfig(target_modules=["o_proj"]))
    assert type(wrapped.base_model).__name__ == "LoraModel"
    pickled = pickle.loads(pickle.dumps(wrapped))
    assert type(pickled.base_model) is type(wrapped.base_model)


def grown(model):
    model.resize_token_embeddings(104, mean_resizing=False)
    return model


def test_mismatched_sizes_are_left_out_where_that_is_asked_for(pair, tmp_path):
    ours, native = pair()
    config = LoraConfig(target_modules=["o_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(ours, copy.deepcopy(config)).save_pretrained(tmp_path, save_embedding_layers=False)

    def load(model, **options):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            opened = PeftModel.from_pretrained(grown(model), tmp_path, **options)
        return opened.eval()(TOKENS).logits.detach(), sorted({str(w.message) for w in said if "mismatch" in str(w)})

    ours, _ = pair()
    with plain_peft():
        expected = load(copy.deepcopy(native), ignore_mismatched_sizes=True)
        with pytest.raises(RuntimeError, match="size mismatch"):
            load(native)
    seen = load(copy.deepcopy(ours), ignore_mismatched_sizes=True)
    # The embeddings' new rows start at random, each model's own way
    torch.testing.assert_close(seen[0][..., :96], expected[0][..., :96], rtol=1e-4, atol=1e-4)
    assert seen[1] == expected[1] and len(seen[1]) == 1
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(ours)


def test_partial_state_dicts_are_set_as_on_native(pair):
    config = LoraConfig(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"])
    results = []
    for model, context in zip(pair(), (contextlib.nullcontext, plain_peft), strict=True):
        with context():
            torch.manual_seed(0)
            wrapped = get_peft_model(model, copy.deepcopy(config))
            shake(wrapped)
            tensors = peft.get_peft_model_state_dict(wrapped)
            part = {name: torch.ones_like(t) for name, t in tensors.items() if ".layers.1." in name}
            result = peft.set_peft_model_state_dict(
                wrapped, {**part, "base_model.model.nothing.lora_A.weight": TOKENS}
            )
            after = peft.get_peft_model_state_dict(wrapped)
            missing = [name for name in result.missing_keys if ".lora_" in name]
            results.append((sorted(missing), sorted(result.unexpected_keys), {n: t.clone() for n, t in after.items()}))
            # What was set does not come back at what follows
            wrapped.delete_adapter("default")
            wrapped.add_adapter("default", copy.deepcopy(config))
    ours, native = results
    assert ours[:2] == native[:2] and ours[0] and ours[1]
    same(ours[2], native[2])


def test_one_model_through_peft_calls(pair, tmp_path):
    """Adapters beside each other, switched off, mixed in a batch, merged, taken out; trained modules and tokens."""
    expert_targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"init_lora_weights": False, "r": 2}
    first = LoraConfig(
        target_modules=["o_proj", "kv_b_proj"], modules_to_save=["lm_head"], trainable_token_indices=[2, 3], **options
    )
    second = LoraConfig(target_modules=["o_proj", "q_a_proj"], **options)
    third = LoraConfig(target_modules=[], target_parameters=expert_targets, **options)

    def calls(model):
        seen = {"base": model(TOKENS).logits}
        torch.manual_seed(0)
        wrapped = get_peft_model(model, copy.deepcopy(first)).eval()
        for name, config in (("second", second), ("third", third)):
            wrapped.add_adapter(name, copy.deepcopy(config))
        shake(wrapped)
        wrapped.eval()
        for name in ("default", "second", "third"):
            wrapped.set_adapter(name)
            seen[name] = wrapped(TOKENS).logits
        with wrapped.disable_adapter():
            seen["off"] = wrapped(TOKENS).logits
        wrapped.base_model.add_weighted_adapter(["second"], [0.5], "halved", combination_type="linear")
        wrapped.set_adapter("halved")
        seen["halved"] = wrapped(TOKENS).logits
        wrapped.set_adapter("second")
        names = [name.replace("_orig", "") for name, p in wrapped.named_parameters() if p.requires_grad]
        seen["trained"] = [name for name in names if ".mtp." not in name]
        merged = copy.deepcopy(wrapped).merge_and_unload()
        seen["merged"], seen["names"] = merged(TOKENS).logits, [n for n in merged.state_dict() if ".mtp." not in n]
        seen["unloaded"] = copy.deepcopy(wrapped).unload()(TOKENS).logits
        wrapped.delete_adapter("third")
        wrapped.set_adapter("default")
        seen["left"] = wrapped(TOKENS).logits
        return seen

    ours, native = pair()
    with torch.no_grad():
        with plain_peft():
            expected = calls(native)
        seen = calls(ours)
    same(seen, expected)
    assert not torch.allclose(seen["default"], seen["base"], atol=1e-2)
    torch.testing.assert_close(seen["off"], seen["base"], rtol=1e-4, atol=1e-4)


def test_merging_and_freezing_change_no_bit(make_model):
    """In fp32, where gradients are on: PEFT compares what is trained with what is merged within 1e-6."""
    model = make_model(**FIELDS)
    before = model(TOKENS).logits
    config = LoraConfig(target_modules="all-linear", trainable_token_indices={"embed_tokens": [2, 3]})
    wrapped = get_peft_model(model, config).eval()
    adapted = wrapped(TOKENS).logits
    merged = wrapped.merge_and_unload(safe_merge=True)
    assert adapted.requires_grad and not any(parameter.requires_grad for parameter in merged.parameters())
    assert torch.equal(merged(TOKENS).logits, before)
    torch.testing.assert_close(adapted, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["LORA", "IA3", "VERA", "LOHA", "GLORA"])
def test_adapters_that_are_off_change_no_bit(kind, make_model):
    """The compiled backend serves what is within PEFT's layers, as it did before."""
    model = make_model(**FIELDS)
    targets = [*LAYERS, *UP, "lm_head"]
    options = {"target_modules": targets}
    if kind == "LORA":
        options.update(modules_to_save=["q_a_proj"], target_parameters=["mlp.experts.down_proj"], target_modules=UP)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{**options, **OPTIONS.get(kind, {})})
    with torch.no_grad():
        before = model(TOKENS).logits
        wrapped = get_peft_model(model, config).eval()
        shake(wrapped)
        on = wrapped(TOKENS).logits
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(TOKENS).logits, before)
        assert torch.equal(wrapped(TOKENS).logits, on) and not torch.allclose(on, before, atol=1e-3)
        # Merged and then switched off: PEFT takes it out of the weights first, wherever it is asked for
        wrapped.merge_adapter()
        merged = wrapped(TOKENS).logits
        torch.testing.assert_close(merged, on, rtol=1e-3, atol=1e-3)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(TOKENS).logits, before, rtol=1e-3, atol=1e-3)


def test_a_hook_on_a_layer_that_is_off_runs(make_model):
    wrapped = get_peft_model(make_model(**FIELDS), LoraConfig(target_modules=["q_b_proj", "kv_b_proj"])).eval()
    seen = []
    attention = wrapped.base_model.model.model.layers[1].self_attn
    for layer in (attention.q_b_proj, attention.kv_b_proj.base_layer):
        layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), wrapped.disable_adapter():
        wrapped(TOKENS)
    assert len(seen) == 2


def test_mixed_adapters_and_injection(make_model, native_twin):
    def calls(model):
        seen = {}
        torch.manual_seed(0)
        plain = copy.deepcopy(model)
        mixed = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False), mixed=True)
        mixed.add_adapter("loha", peft.LoHaConfig(target_modules=["q_b_proj"], init_weights=False))
        mixed.set_adapter(["default", "loha"])
        seen["mixed"] = mixed.eval()(TOKENS).logits
        injected = peft.inject_adapter_in_model(
            peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[]), plain
        )
        shake(injected)
        seen["injected"] = injected.eval()(TOKENS).logits
        seen["tensors"] = peft.get_peft_model_state_dict(injected)
        return seen

    ours = make_model(**FIELDS, num_nextn_predict_layers=0)
    native = native_twin(ours)
    with torch.no_grad():
        with plain_peft():
            expected = calls(native)
        same(calls(ours), expected)


def test_mtp_layers_stay_frozen_and_where_they_are(make_model):
    model = make_model(**FIELDS, mtp_loss_weight=0.3)
    layers = model.model.mtp
    for config in (
        peft.VeraConfig(target_modules="all-linear"),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ):
        copied = copy.deepcopy(model).train()
        assert all(p.requires_grad for p in copied.model.mtp.parameters())
        wrapped = get_peft_model(copied, config)
        trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        assert trained and not [name for name in trained if ".mtp." in name]
        assert list(copied.model._modules) == list(model.model._modules)
        assert [type(m) for m in copied.model.mtp.modules()] == [type(m) for m in layers.modules()]


def test_mtp_adapters_have_official_names_in_files(make_model, tmp_path):
    name = "model.layers.3.self_attn.o_proj"
    wrapped = get_peft_model(make_model(**FIELDS), LoraConfig(target_modules=[name], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.lora_{part}.weight" for part in "AB"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [name]
    opened = PeftModel.from_pretrained(make_model(**FIELDS), tmp_path)
    same(peft.get_peft_model_state_dict(opened), tensors)
    loaded = make_model(**FIELDS)
    loaded.load_adapter(str(tmp_path))
    same(
        loaded.model.mtp[0].self_attn.o_proj.lora_A["default"].weight,
        tensors[f"base_model.model.{name}.lora_A.weight"],
    )


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_prefixes_are_latents(kind, pair, tmp_path):
    """Native fails here: PEFT makes keys and values of heads."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    ours, native = pair()
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with plain_peft(), pytest.raises(RuntimeError, match="Sizes of tensors"):
        get_peft_model(native, copy.deepcopy(config))(TOKENS)
    torch.manual_seed(0)
    wrapped = get_peft_model(ours, config)
    mask = torch.ones_like(TOKENS)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    wrapped.eval().save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(pair()[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, wrapped(TOKENS).logits)
        text = wrapped.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
        by_hand = TOKENS
        for _ in range(4):
            by_hand = torch.cat([by_hand, wrapped(input_ids=by_hand).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(text, by_hand)
        # Left padding is not seen
        padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), TOKENS], dim=1)
        seen = torch.cat([torch.zeros(2, 2, dtype=torch.long), mask], dim=1)
        ids = torch.arange(14)[None].expand(2, -1) + 1
        logits = wrapped(input_ids=padded, attention_mask=seen, position_ids=ids).logits
        assert torch.isfinite(logits).all()
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(TOKENS).logits, pair()[0](TOKENS).logits)


def test_prefixes_that_are_too_small_for_a_latent(make_model):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    small = get_peft_model(make_model(kv_lora_rank=64), config)  # 4 heads of 8, for 72 numbers
    with pytest.raises(ValueError, match="Prefix tuning: this model caches 72 numbers.*the 64 that PEFT makes"):
        small(TOKENS)


def test_a_replaced_fold_is_called(pair, monkeypatch):
    """PEFT's tests watch adapters of experts by the module that folds them into the weights."""
    wrapped = get_peft_model(pair()[0], LoraConfig(target_parameters=["mlp.experts.down_proj"], target_modules=[]))
    wrapped.eval()(TOKENS)
    folded, fold = [], _LoraFactorsProxy.forward
    monkeypatch.setattr(_LoraFactorsProxy, "forward", lambda self, W: folded.append(W.shape) or fold(self, W))
    monkeypatch.setattr(backends.ADAPTED, "backends", ())
    wrapped(TOKENS)
    assert folded
