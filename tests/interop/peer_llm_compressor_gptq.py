"""Calibrates a checkpoint by llm-compressor's GPTQ, without the plugin.

python peer_llm_compressor_gptq.py CHECKPOINT OUTPUT BITS EXPERTS_BITS TOKENS, the last "all" or "routed": those that
experts are calibrated on. OUTPUT is a folder with `windows.safetensors`: token ids int64 `(windows, tokens)`, each a
sample. It gets `values.safetensors`: what the quantised weights stand for, fp32. Groups of 32, symmetric; all else as
llm-compressor's defaults have it.
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


checkpoint, folder, bits, experts_bits, tokens = sys.argv[1:]
output = Path(folder)
EXPERTS = r"re:.*mlp\.experts\.\d+\..*"


def scheme(targets, bits):
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    return QuantizationScheme(targets=targets, weights=weights)


model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
windows = load_file(output / "windows.safetensors")["windows"]
samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
recipe = GPTQModifier(
    config_groups={"experts": scheme([EXPERTS], int(experts_bits)), "others": scheme(["Linear"], int(bits))},
    ignore=["lm_head", "re:.*kv_b_proj", "re:.*mlp.gate$"],
)
oneshot(
    model=model,
    dataset=DataLoader(samples, batch_size=1),
    recipe=recipe,
    num_calibration_samples=len(samples),
    moe_calibrate_all_experts=tokens == "all",
)
values = {}
for name, module in model.named_modules():
    if hasattr(module, "weight_scale"):
        # GPTQ leaves in each weight what its whole numbers stand for
        groups = module.weight.detach().float().unflatten(-1, (-1, 32)) / module.weight_scale.float().unsqueeze(-1)
        assert torch.allclose(groups, groups.round(), atol=1e-3), name
        values[f"{name}.weight"] = module.weight.detach().float().contiguous()
save_file(values, output / "values.safetensors")
