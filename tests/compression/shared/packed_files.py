"""Small quantised checkpoints written by the formats' own library, or by their definition where it has none here."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transformers_dsv3.kernels.quantized_groups import dequantize
from transformers_dsv3.models.dsv3.checkpoint_conversion_dsv3 import official_name


# Of a small model, multiples of 32
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32}
WIDE |= {"num_attention_heads": 4, "v_head_dim": 8, "vocab_size": 150}
# Left in bf16 by Kimi-K2: all but routed experts
KIMI_IGNORES = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    "re:.*eh_proj",
]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def config_of(weights=WEIGHTS, ignore=("lm_head",), targets=("Linear",), form="pack-quantized", inputs=None):
    """`quantization_config` as llm-compressor and Kimi-K2's release write it, of one group."""
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def compress(weight, weights=WEIGHTS, form="pack-quantized", scale_dtype=torch.bfloat16):
    """By compressed-tensors: the tensors of one weight, by what follows its module's name, and what they stand for."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    groups = weight.float()
    if weights["strategy"] == "group":
        groups = groups.unflatten(-1, (-1, weights["group_size"]))
    low, high = groups.amin(-1), groups.amax(-1)
    if weights["strategy"] == "channel":
        low, high = low[:, None], high[:, None]
    scale, zero = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight.to(scale_dtype), "weight_scale": scale.to(scale_dtype)}
    if not weights["symmetric"]:
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = compressor.compress(state, scheme)
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return state, compressor.decompress(exact, scheme)["weight"]


def rewrite(folder, config, change, quantized):
    """Quantises some weights of a checkpoint in place.

    Args:
        config: the `quantization_config` to write.
        change: from a weight to its tensors and what they stand for, as `compress` gives them.
        quantized: whether a weight of a name is one.

    Returns:
        What all weights stand for, fp32, by official names.
    """
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(".weight") and quantized(name)]:
        state, expected[name] = change(tensors.pop(name))
        stem = name.removesuffix("weight")
        tensors |= {stem + part: tensor.contiguous() for part, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    fields = json.loads((Path(folder) / "config.json").read_text())
    fields["quantization_config"] = config
    (Path(folder) / "config.json").write_text(json.dumps(fields))
    return expected


def pack_rows(elements, bits):
    """Elements `(R, C)` of `bits` bits to int32 `(R, C * bits / 32)`, from the lowest bit on, by Python's numbers."""
    rows = []
    for row in elements.tolist():
        number = sum(element << (bits * i) for i, element in enumerate(row))
        words = [(number >> 32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(weight, bits=4, group=32, order=None, symmetric=True, second=False):
    """A weight `(N, K)` in GPTQ's format, rounded to nearest, and what it stands for."""
    rows, columns = weight.shape
    groups = torch.arange(columns) // group if order is None else order
    scale = torch.zeros(rows, columns // group)
    for g in range(columns // group):
        scale[:, g] = weight[:, groups == g].abs().amax(1) / (1 << (bits - 1))
    scale = scale.half().float()
    top = (1 << bits) - 1
    zero = torch.full(scale.shape, 1 << (bits - 1))
    if not symmetric:
        zero = torch.randint(1, top, scale.shape, generator=torch.Generator().manual_seed(1))
    whole = (weight.float() / scale[:, groups]).round().add(zero[:, groups]).clamp(0, top).long()
    return {
        "qweight": pack_rows(whole, bits).T.contiguous(),
        "qzeros": pack_rows((zero - int(not second)).T, bits),
        "scales": scale.T.half().contiguous(),
        "g_idx": groups.int(),
    }, (whole - zero[:, groups]) * scale[:, groups]


def awq(weight, group=32):
    """A weight `(N, K)` in AWQ's format, and what it stands for."""
    rows, columns = weight.shape
    low, high = weight.float().unflatten(1, (-1, group)).aminmax(dim=-1)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15).long()
    wide = [tensor.repeat_interleave(group, 1) for tensor in (scale, zero)]
    whole = (weight.float() / wide[0]).round().add(wide[1]).clamp(0, 15).long()
    places = [0, 2, 4, 6, 1, 3, 5, 7]  # the column at each place of a word

    def pack(elements):
        return pack_rows(elements.unflatten(-1, (-1, 8))[..., places].flatten(-2), 4)

    tensors = {"qweight": pack(whole.T), "qzeros": pack(zero.T), "scales": scale.T.half().contiguous()}
    return tensors, (whole - wide[1]) * wide[0]


def values_of(model):
    """What a model's weights stand for, fp32, by official names."""
    found = {}
    for name, module in model.named_modules():
        for leaf in ("weight", "gate_up_proj", "down_proj", "e_score_correction_bias"):
            tensor, scale = getattr(module, leaf, None), getattr(module, f"{leaf}_scale", None)
            if not isinstance(tensor, torch.Tensor):
                continue
            tensor = dequantize(tensor, scale, torch.float32) if scale is not None else tensor.float()
            if leaf in ("gate_up_proj", "down_proj"):
                parts = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
                for e, stacked in enumerate(tensor):
                    for part, value in zip(parts, stacked.chunk(len(parts))):
                        found[official_name(f"{name}.{e}.{part}.weight", model.config)] = value
            else:
                found[official_name(f"{name}.{leaf}", model.config)] = tensor
    return found


def plain_twin(model, quantized):
    values = values_of(quantized)
    with torch.no_grad():
        for name, tensor in values_of(model).items():  # views of its weights
            tensor.copy_(values[name])
    return model


def memory_of(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def check_saved_again(folder, model=None):
    """What `save_pretrained` wrote in `folder` is byte by byte what it writes of a model loaded from there.

    Args:
        model: what was loaded, where it was.
    """
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        written = {file.name: file.read_bytes() for file in Path(again).iterdir()}
    assert written.keys() == {file.name for file in folder.iterdir()}
    for name, data in written.items():
        assert data == (folder / name).read_bytes(), name
