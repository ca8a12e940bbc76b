"""PEFT: adapters and merged checkpoints that are saved here, opened by plain PEFT and native Transformers."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_peft_trl.py"
IDS = list(range(3, 67))
ROUTED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What plain PEFT opens exactly: it takes names of MLPs for the routed experts, whatever they belong to
EXACT = {
    "attention": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "routed experts": {"target_modules": ["o_proj"], "target_parameters": ROUTED},
}
# What needs the plugin, or to be merged
MERGED = {"every linear layer": {"target_modules": "all-linear"}}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


def test_adapters_and_merged_checkpoints(peer, save, tmp_path):
    plain = peer("DSV3_PEFT_PYTHON", "peft", "peft")
    base = tmp_path / "base"
    save(base)
    jobs, expected = [], {}
    for name, targets in {**EXACT, **MERGED}.items():
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **targets),
        )
        expected[name] = logits(model)
        assert (expected[name] - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
        if name in EXACT:
            model.save_pretrained(tmp_path / name)
            jobs.append({"name": name, "model": str(base), "adapter": str(tmp_path / name), "ids": IDS})
            jobs[-1]["save"] = str(tmp_path / f"{name}, theirs")
        model.merge_and_unload().save_pretrained(tmp_path / f"{name}, merged")
        jobs.append({"name": f"{name}, merged", "model": str(tmp_path / f"{name}, merged"), "ids": IDS})
        expected[f"{name}, merged"] = expected[name]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    plain.run(SCRIPT, tmp_path / "jobs.json", tmp_path)
    differences = {}
    for job in jobs:
        theirs = torch.load(tmp_path / f"{job['name']}.pt")
        differences[job["name"]] = (theirs - expected[job["name"]]).abs().max().item()
        if "save" in job:  # and back
            again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), job["save"])
            torch.testing.assert_close(logits(again), expected[job["name"]], rtol=1e-5, atol=1e-5)
    deviation = expected["attention"].std().item()
    print(
        f"PEFT: logits of deviation {deviation:.2f}, max |difference| {max(differences.values()):.2e}, {differences}"
    )
    assert max(differences.values()) <= 1e-4 * deviation
