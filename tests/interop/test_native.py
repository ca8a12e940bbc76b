"""Native Transformers, in a process without the plugin: what it saves the plugin opens, and the other way round."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, pipeline

import transformers_dsv3
from tests import programs
from transformers_dsv3.models.dsv3 import checkpoint_dsv3


SCRIPT = Path(__file__).parent / "peer_native.py"
PROMPT = "JSON is"
IDS = list(range(3, 67))
# Keys of official checkpoints that native Transformers leaves out, and that vLLM and llama.cpp read
ADDED_KEYS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
NATIVE = {
    "plain": {},
    "sharded": {"max_shard_size": "50KB"},
    "bf16": {"dtype": "bfloat16"},
    "bf16, bias too": {"dtype": "bfloat16", "cast_bias": True},
    "bf16, sharded": {"dtype": "bfloat16", "max_shard_size": "50KB"},
    "tied": {"tie_word_embeddings": True},
    "YaRN, no query LoRA": {"with_yarn": True, "q_lora_rank": None},
}


def native_config(**overrides):
    fields = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "max_position_embeddings": 256,
    }
    return {**fields, **overrides}


def run_native(jobs, file):
    """Native Transformers does `jobs` in one process that has not imported the plugin."""
    file.write_text(json.dumps(jobs))
    done = programs.run([SCRIPT, file])
    assert done.returncode == 0, done.stderr[-8000:]


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def report(folder):
    return json.loads((folder / "report.json").read_text())


def assert_same_tensors(one, other, upcast=""):
    """Bit-equal tensors, after fp32 is made of those whose name ends in `upcast`."""
    one, other = tensors(one), tensors(other)
    if upcast:
        one = {name: tensor.float() if name.endswith(upcast) else tensor for name, tensor in one.items()}
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def relative_error(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def trips(tmp_path_factory, yarn):
    """Per case the folders `native` (made and saved by native), `plugin` (from that) and `back` (from that).

    And `messages`, what the plugin logged while loading.
    """
    root = tmp_path_factory.mktemp("trips")
    cases, jobs = {}, []
    for name, case in NATIVE.items():
        fields = dict(case)
        defaults = {"dtype": "float32", "cast_bias": False, "max_shard_size": "10GB"}
        job = {key: fields.pop(key, default) for key, default in defaults.items()}
        if fields.pop("with_yarn", False):
            fields["rope_parameters"] = yarn
        folders = {stage: root / name.replace(", ", "-") / stage for stage in ("native", "plugin", "back")}
        cases[name] = {**job, **folders}
        jobs.append({**job, "config": native_config(**fields), "ids": IDS, "save": str(folders["native"])})
    run_native(jobs, root / "make.json")

    for case in cases.values():
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record, messages=messages: messages.append(record.getMessage())
        checkpoint_dsv3.logger.addHandler(handler)
        try:
            model = AutoModelForCausalLM.from_pretrained(case["native"])
        finally:
            checkpoint_dsv3.logger.removeHandler(handler)
        assert type(model) is transformers_dsv3.Dsv3ForCausalLM
        model.save_pretrained(case["plugin"], max_shard_size=case["max_shard_size"])
        with torch.no_grad():
            case |= {"messages": messages, "logits": model(torch.tensor([IDS])).logits[0], "config": model.config}
        case["model"] = model

    back = [
        {
            "load": str(case["plugin"]),
            "save": str(case["back"]),
            "max_shard_size": case["max_shard_size"],
            "ids": IDS,
        }
        for case in cases.values()
    ]
    run_native(back, root / "back.json")
    return cases


@pytest.fixture(params=NATIVE)
def trip(request, trips):
    return trips[request.param]


class TestNativeToPluginToNative:
    def test_tensors_bit_equal(self, trip):
        bias = "e_score_correction_bias"
        # The plugin's correction bias is fp32 always; a native one is bf16 after `.to(torch.bfloat16)`
        assert_same_tensors(trip["native"], trip["plugin"], upcast=bias if trip["cast_bias"] else "")
        assert_same_tensors(trip["plugin"], trip["back"])
        for stage in ("native", "plugin", "back"):
            assert (len(list(trip[stage].glob("*.safetensors"))) > 1) == (trip["max_shard_size"] != "10GB")
        dtypes = {name: tensor.dtype for name, tensor in tensors(trip["plugin"]).items()}
        assert {dtype for name, dtype in dtypes.items() if not name.endswith(bias)} == {getattr(torch, trip["dtype"])}
        assert {dtype for name, dtype in dtypes.items() if name.endswith(bias)} == {torch.float32}

    def test_config_values_equal(self, trip):
        native, plugin, back = (config(trip[stage]) for stage in ("native", "plugin", "back"))
        # Announced by native's default, but its save has no MTP layers
        assert native["num_nextn_predict_layers"] == 1
        rope = dict(native["rope_parameters"])
        added = {**ADDED_KEYS, "rope_theta": rope.pop("rope_theta")}
        if rope["rope_type"] != "default":
            added["rope_scaling"] = rope
        assert plugin == {**native, **added, "num_nextn_predict_layers": 0}
        # What native keeps of it: all but the older spelling of RoPE, which it reads and does not write
        assert back == {key: value for key, value in plugin.items() if key not in ("rope_theta", "rope_scaling")}
        assert trip["config"].rope_parameters == native["rope_parameters"]

    def test_native_class_and_all_tensors(self, trip):
        seen = report(trip["back"])
        assert seen["class"] == "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3ForCausalLM"
        assert not seen["missing_keys"] and not seen["unexpected_keys"] and not seen["mismatched_keys"]

    def test_logits(self, trip):
        first, last = (torch.load(trip[stage] / "logits.pt") for stage in ("native", "back"))
        if trip["dtype"] == "float32":
            assert torch.equal(first, last)
            error = relative_error(trip["logits"], first)
            assert error <= 1e-6

    def test_generation_config_kept(self, trip):
        native, plugin, back = (
            json.loads((trip[stage] / "generation_config.json").read_text()) for stage in ("native", "plugin", "back")
        )
        assert native == plugin == back


def test_older_rope_keys(tmp_path, yarn):
    """Both spellings of RoPE are written and read alike; a file where they differ is refused."""
    made = transformers_dsv3.Dsv3Config(**native_config(rope_parameters=yarn))
    assert "rope_scaling" not in made.to_dict() and "rope_theta" not in made.to_dict()
    made.save_pretrained(tmp_path)
    written = config(tmp_path)
    assert written["rope_theta"] == yarn["rope_theta"]
    assert written["rope_scaling"] == {key: value for key, value in yarn.items() if key != "rope_theta"}
    for reader in (transformers_dsv3.Dsv3Config, DeepseekV3Config):
        assert reader.from_pretrained(tmp_path).rope_parameters == yarn
        without_new = {key: value for key, value in written.items() if key != "rope_parameters"}
        assert reader.from_dict(without_new).rope_parameters == yarn
    changed = transformers_dsv3.Dsv3Config.from_pretrained(tmp_path, rope_parameters={**yarn, "factor": 2.0})
    assert changed.rope_parameters["factor"] == 2.0
    for key, value in (("rope_theta", 5.0), ("rope_scaling", {"type": "linear", "factor": 4.0})):
        with pytest.raises(ValueError, match="`rope_parameters`: its `rope_t.*contradicts.*older spelling"):
            transformers_dsv3.Dsv3Config.from_dict({**written, key: value})


def test_absent_mtp_layers_are_said(trips):
    """Native's config announces an MTP layer which its save has dropped: a warning, and the config is corrected."""
    case = trips["plain"]
    assert case["messages"] == [
        f"{case['native']}: the config announces 1 MTP layer(s), but there are no MTP tensors of model.layers.3. "
        "Loading with num_nextn_predict_layers=0."
    ]
    assert case["config"].num_nextn_predict_layers == 0
    assert case["model"].model.mtp_layers == []


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory, tokenizer):
    """A model with two MTP layers, saved with its tokenizer by the plugin (`ours`), opened and saved by native."""
    root = tmp_path_factory.mktemp("mtp")
    torch.manual_seed(0)
    fields = native_config(vocab_size=len(tokenizer), num_nextn_predict_layers=2)
    made = transformers_dsv3.Dsv3Config(**fields, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
    model = transformers_dsv3.Dsv3ForCausalLM(made).eval()
    model.save_pretrained(root / "ours")
    tokenizer.save_pretrained(root / "ours")
    job = {"load": str(root / "ours"), "save": str(root / "native"), "max_shard_size": "10GB", "ids": IDS}
    run_native([{**job, "prompt": PROMPT}], root / "job.json")
    return root, model


class TestNativeOpensMtp:
    def test_mtp_layers_are_reported_and_left_out(self, with_mtp):
        root, _ = with_mtp
        stored, kept = tensors(root / "ours"), tensors(root / "native")
        of_mtp = {name for name in stored if name.startswith(("model.layers.3.", "model.layers.4."))}
        seen = report(root / "native")
        assert not seen["missing_keys"] and not seen["mismatched_keys"]
        # By native's names: experts fused
        assert {key.split(".")[2] for key in seen["unexpected_keys"]} == {"3", "4"}
        assert kept.keys() == stored.keys() - of_mtp
        assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())

    def test_logits(self, with_mtp):
        root, model = with_mtp
        theirs = torch.load(root / "native" / "logits.pt")
        with torch.no_grad():
            error = relative_error(model(torch.tensor([IDS])).logits[0], theirs)
        assert error <= 1e-6

    def test_tokenizer_and_pipeline(self, with_mtp, tokenizer):
        root, _ = with_mtp
        seen = report(root / "native")
        assert seen["ids"] == tokenizer(PROMPT)["input_ids"]
        assert AutoTokenizer.from_pretrained(root / "ours")(PROMPT)["input_ids"] == seen["ids"]
        generate = pipeline("text-generation", model=str(root / "ours"))
        assert type(generate.model) is transformers_dsv3.Dsv3ForCausalLM
        assert len(generate.model.model.mtp_layers) == 2
        assert generate(PROMPT, max_new_tokens=16, do_sample=False)[0]["generated_text"] == seen["text"]
