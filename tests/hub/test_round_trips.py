"""What was pushed is opened by others, with the plugin and without, by Hugging Face's own functions."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import transformers_dsv3
from transformers_dsv3.hub.code_file import CODE_FILE
from transformers_dsv3.hub.push import push_to_hub


@pytest.fixture
def logits():
    def forward(model):
        with torch.no_grad():
            return model.eval()(torch.arange(40)[None]).logits[0]

    return forward


@pytest.fixture
def shared(hub, make_model, byte_tokenizer, tmp_path):
    """Model, older revision, private and coded copies and adapter, each with tokenizer and card, in one call each."""
    card = ModelCard("---\nlicense: apache-2.0\n---\n# A small model\n")
    models = {seed: make_model(seed=seed, vocab_size=258) for seed in (1, 2)}
    together = {"tokenizer": byte_tokenizer, "card": card}
    push_to_hub(models[2], "anna/model", **together)
    repository = hub.repositories["model", "anna/model"]
    repository.tags["v1"] = repository.refs["main"]
    models[1].save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    byte_tokenizer.save_pretrained(tmp_path / "sharded")
    card.save(tmp_path / "sharded" / "README.md")
    push_to_hub(tmp_path / "sharded", "anna/model")
    push_to_hub(models[1], "anna/private", private=True, **together)
    push_to_hub(models[1], "anna/with-code", include_code=True, **together)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj", "kv_b_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded"), config)
    push_to_hub(adapted, "anna/adapter", base_model="anna/model", **together)
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= set(hub.files("anna/adapter"))
    return models, adapted


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_the_plugin(hub, shared, logits, shell, tmp_path, byte_tokenizer, measured):
    models, adapted = shared
    process = shell(Path(__file__).with_name("client_native.py"), tmp_path)
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, output
    assert not any(token in output for token in hub.tokens.values())
    report = json.loads((tmp_path / "report.json").read_text())
    theirs = torch.load(tmp_path / "logits.pt")
    assert report["class"] == "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3ForCausalLM"
    assert set(report["snapshot"]) == set(hub.files("anna/model"))
    assert (report["card"], report["config"]["model_type"]) == ("apache-2.0", "deepseek_v3")
    wanted = {name: logits(models[1]) for name in ("model", "private", "with code")}
    wanted |= {"v1": logits(models[2]), "adapter": logits(adapted), "adapter alone": logits(adapted)}
    assert wanted.keys() == theirs.keys()
    difference = max((theirs[name] - ours).abs().max().item() for name, ours in wanted.items())
    measured["Hub, logits of native from there beside the plugin's, largest difference"] = difference
    for name, ours in wanted.items():
        close(ours, theirs[name])
    assert "anna/private" in report["private without a token"]
    assert "pip install transformers-dsv3" in report["code without the package"]
    assert report["ids"] == byte_tokenizer("def main(")["input_ids"]
    # (`adapted` holds a copy of this model's weights)
    generate = pipeline("text-generation", model=models[1], tokenizer=byte_tokenizer)
    assert report["text"] == generate("def main(", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    # What native pushed opens here
    assert hub.repositories["model", "anna/native"].private
    assert len([name for name in hub.files("anna/native") if name.endswith(".safetensors")]) > 2
    model = AutoModelForCausalLM.from_pretrained("anna/native")
    assert isinstance(model, transformers_dsv3.Dsv3ForCausalLM)
    close(logits(model), theirs["model"])


def test_with_the_plugin(hub, shared, logits, tmp_path):
    models, adapted = shared
    for repo_id, revision, seed in (("model", None, 1), ("model", "v1", 2), ("private", None, 1)):
        model = AutoModelForCausalLM.from_pretrained(f"anna/{repo_id}", revision=revision or "main")
        assert isinstance(model, transformers_dsv3.Dsv3ForCausalLM)
        close(logits(model), logits(models[seed]))
    close(logits(PeftModel.from_pretrained(model, "anna/adapter")), logits(adapted))
    with pytest.raises(OSError, match="anna/private"):
        AutoModelForCausalLM.from_pretrained("anna/private", token=hub.tokens["eve"], cache_dir=tmp_path / "empty")
    # Transformers' own way to push takes the plugin's model too
    models[1].push_to_hub("lab/model", max_shard_size="60KB")
    assert sorted(name for name in hub.files("lab/model") if "model" in name) == sorted(
        name for name in hub.files("anna/model") if "model" in name
    )
    close(logits(AutoModelForCausalLM.from_pretrained("lab/model")), logits(models[1]))


TRUSTING = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("anna/with-code", trust_remote_code=True).eval()
assert "transformers_dsv3" in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits[0], sys.argv[1] + "/logits.pt")
print(type(model).__module__, type(model).__name__)
model.save_pretrained(sys.argv[1] + "/saved")
"""


def test_trusting_remote_code(hub, shared, logits, shell, tmp_path):
    """Nobody imports the plugin: the code file does."""
    models, _ = shared
    process = shell("-c", TRUSTING, tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.split() == ["transformers_dsv3.models.dsv3.modeling_dsv3", "DeepseekV3ForCausalLM"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(models[1]), rtol=0, atol=0)
    # Official again, without code
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "auto_map" not in config and not list((tmp_path / "saved").glob("*.py"))
    assert CODE_FILE in hub.files("anna/with-code") and CODE_FILE not in hub.files("anna/model")


@pytest.mark.parametrize("fault", [{"kind": "cut_response", "at": 20_000}, {"kind": "status", "status": 500}])
def test_unchanged_scripts_under_faults(hub, checkpoints, short_waits, logits, tally, fault):
    """`from_pretrained` and `snapshot_download` get over it or raise; the cache never has half a file."""
    push_to_hub(checkpoints / "sharded", "anna/model")
    wanted = logits(AutoModelForCausalLM.from_pretrained(checkpoints / "sharded"))
    there = hub.files("anna/model")
    for load in (AutoModelForCausalLM.from_pretrained, snapshot_download):
        injected = hub.inject("GET /cdn/", times=3, **fault)
        try:
            load("anna/model", force_download=True)
        except Exception as error:
            assert not any(token in str(error) for token in hub.tokens.values())
        hub.faults.clear()
        close(logits(AutoModelForCausalLM.from_pretrained("anna/model")), wanted)
        folder = Path(snapshot_download("anna/model"))
        lost = [name for name in there if (folder / name).read_bytes() != there[name]]
        tally.settle(injected.hits, tally.RAISED, lost)
    assert AutoTokenizer.from_pretrained("anna/model")("a")["input_ids"]
