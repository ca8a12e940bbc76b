"""A step of LoRA on experts beside PEFT's own forward: time and memory. Slow: run on a quiet machine."""

import json
import subprocess
import sys

import pytest


pytestmark = pytest.mark.slow

# One layer of the benchmark's model, "bench-2b": 64 experts of width 1,408, 6 a token, bf16
STEP = """
import json, resource, statistics, sys, time
import torch
from peft import LoraConfig, get_peft_model
import transformers_dsv3
from transformers_dsv3.models.dsv3 import moe_dsv3

if sys.argv[1] == "peft":
    moe_dsv3.adapted_experts = lambda module: None
torch.manual_seed(0)
config = transformers_dsv3.Dsv3Config(
    hidden_size=2048, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1,
    n_shared_experts=0, first_k_dense_replace=0, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=16,
)
config._experts_implementation = "auto"
layer = torch.nn.Sequential()
layer.mlp = moe_dsv3.Dsv3MoE(config).to(torch.bfloat16)
with torch.no_grad():
    for weight in layer.parameters():
        weight.normal_(0, 0.02)
parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
layer = get_peft_model(layer, LoraConfig(r=8, target_modules=[], target_parameters=parameters)).train()
hidden = torch.randn(1, 2048, 2048, dtype=torch.bfloat16, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = []
for _ in range(6):
    started = time.perf_counter()
    layer(hidden).square().mean().backward()
    seconds.append(time.perf_counter() - started)
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": statistics.median(seconds[1:]), "gib": extra / 2**20}))
"""


def test_time_and_memory_beside_peft(measured):
    runs = {"ours": [], "peft": []}
    for who in ("ours", "peft", "peft", "ours"):
        result = subprocess.run([sys.executable, "-c", STEP, who], check=True, capture_output=True, text=True)
        runs[who].append(json.loads(result.stdout))
    time_ratio = sum(r["seconds"] for r in runs["peft"]) / sum(r["seconds"] for r in runs["ours"])
    memory_ratio = sum(r["gib"] for r in runs["ours"]) / sum(r["gib"] for r in runs["peft"])
    for who, figures in runs.items():
        for figure, unit in (("seconds", "s"), ("gib", "GiB")):
            value = sum(run[figure] for run in figures) / len(figures)
            measured[f"LoRA of rank 8 on a bench-2b layer's experts, 2,048 tokens, {who}, {unit}"] = value
    assert time_ratio >= 2 and memory_ratio <= 0.5
