"""Small checkpoints in DeepSeek's FP8 format, written by the definition of the format."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import transformers_dsv3
from transformers_dsv3.models.dsv3.checkpoint_conversion_dsv3 import official_name


FP8 = torch.float8_e4m3fn
# Left in bf16 by DeepSeek: embeddings, head, norms, router
NOT_QUANTIZED = ("embed_tokens", "lm_head", "shared_head.head", "norm", "mlp.gate.", "eh_proj")


def tiny_config(**overrides):
    fields = {
        "vocab_size": 96,
        "hidden_size": 72,
        "intermediate_size": 136,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 128,
    }
    return transformers_dsv3.Dsv3Config(**{**fields, **overrides})


def reference_dequantize(weight, scale, block_size):
    """float64, one element at a time, by the definition of the format."""
    scales = scale.double().tolist()
    values = [
        [value * scales[i // block_size[0]][j // block_size[1]] for j, value in enumerate(row)]
        for i, row in enumerate(weight.double().tolist())
    ]
    return torch.tensor(values, dtype=torch.float64)


def quantize(weight, block_size):
    """Scales of the block maxima, as DeepSeek's training code does; loops over blocks, partial ones included."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=FP8)
    scale = torch.empty(-(-rows // block_size[0]), -(-columns // block_size[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (
                slice(i * block_size[0], (i + 1) * block_size[0]),
                slice(j * block_size[1], (j + 1) * block_size[1]),
            )
            scale[i, j] = weight[block].abs().max().clamp(min=1e-12) / 448
            quantized[block] = (weight[block] / scale[i, j]).to(FP8)
    return quantized, scale


def write_fp8_checkpoint(folder: Path, config, block_size=(128, 128), keep=(), shards=3):
    """Write a random model in the official FP8 layout. Returns the exact dequantised values by checkpoint name."""
    torch.manual_seed(0)
    model = transformers_dsv3.Dsv3ForCausalLM(config)
    model.save_pretrained(folder)
    expected, stored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or any(part in name for part in (*NOT_QUANTIZED, *keep)):
            stored[name] = tensor if "e_score" in name else tensor.to(torch.bfloat16)
            expected[name] = stored[name].double()
            continue
        weight, scale = quantize(tensor, block_size)
        stored[name], stored[f"{name}_scale_inv"] = weight, scale
        expected[name] = reference_dequantize(weight, scale, block_size)
    (folder / "model.safetensors").unlink()
    rewrite(folder, stored, shards)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block_size),
    }
    fields.pop("dtype", None)
    fields["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(fields))
    return expected


def rewrite(folder: Path, stored, shards=3):
    """Write tensors as `shards` files with an index, weights apart from their scales where it falls that way."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    names, weight_map = sorted(stored), {}
    for i in range(shards):
        filename = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, filename)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_all(folder: Path):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def per_expert(model):
    """State dict by checkpoint names."""
    named = {}
    for name, tensor in model.state_dict().items():
        name = official_name(name, model.config)
        if ".experts.gate_up_proj" in name:
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                named[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                named[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif ".experts.down_proj" in name:
            named |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(tensor)}
        else:
            named[name] = tensor
    return named
