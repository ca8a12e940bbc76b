"""Quantises a checkpoint by llm-compressor, without the plugin: rounding to nearest, no calibration.

python peer_llm_compressor.py CHECKPOINT OUTPUT SCHEME, the last by llm-compressor's names, such as W4A16. Beside the
checkpoint goes `values.safetensors`: what compressed-tensors says that its weights stand for, fp32.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


checkpoint, output, scheme = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
ignored = ["lm_head", "re:.*kv_b_proj", "re:.*mlp.gate$"]
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignored), pipeline="datafree")
model.save_pretrained(output, save_compressed=True)

(group,) = json.loads((Path(output) / "config.json").read_text())["quantization_config"]["config_groups"].values()
compressor = BaseCompressor.get_value_from_registry(group["format"])
stored, values = load_file(Path(output) / "model.safetensors"), {}
for name in stored:
    if name.endswith(".weight_scale"):
        stem = name.removesuffix("weight_scale")
        parts = {part.removeprefix(stem): tensor for part, tensor in stored.items() if part.startswith(stem)}
        parts["weight_scale"] = parts["weight_scale"].float()
        values[f"{stem}weight"] = compressor.decompress(parts, QuantizationScheme(**group))["weight"].contiguous()
save_file(values, Path(output) / "values.safetensors")
