"""Run without the plugin: native Transformers makes checkpoints, or opens them and saves them again.

Takes a JSON list of jobs; each is a folder to `save` to, and a native `config` to make a model of or a folder to
`load`. Writes what happened to `report.json` in the folder saved to, and logits to `logits.pt`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, pipeline


def make(job):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**job["config"]))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name or "layernorm" not in name and name in dict(model.named_parameters()):
                tensor.normal_(std=0.1)
    model.to(getattr(torch, job["dtype"]))
    if not job["cast_bias"]:  # as in published checkpoints, and after from_pretrained; `.to` casts it
        for gate in (layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")):
            gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    return model, {}


def load(job):
    model, info = AutoModelForCausalLM.from_pretrained(job["load"], output_loading_info=True)
    report = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if "prompt" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["load"])
        report["ids"] = tokenizer(job["prompt"])["input_ids"]
        generate = pipeline("text-generation", model=job["load"])
        report["text"] = generate(job["prompt"], max_new_tokens=16, do_sample=False)[0]["generated_text"]
    return model, report


def main():
    for job in json.loads(Path(sys.argv[1]).read_text()):
        model, report = load(job) if "load" in job else make(job)
        folder = Path(job["save"])
        model.eval().save_pretrained(folder, max_shard_size=job["max_shard_size"])
        with torch.no_grad():
            torch.save(model(torch.tensor(job["ids"])[None]).logits[0], folder / "logits.pt")
        report["class"] = f"{type(model).__module__}.{type(model).__name__}"
        (folder / "report.json").write_text(json.dumps(report))
    assert "transformers_dsv3" not in sys.modules


if __name__ == "__main__":
    main()
