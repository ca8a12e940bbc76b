"""A model with quantised layers as a checkpoint of compressed-tensors' `pack-quantized` format, by official names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from ...kernels.quantized_groups import dequantize, whole_numbers
from ...models.dsv3.checkpoint_conversion_dsv3 import official_name
from ...models.dsv3.configuration_dsv3 import text_config
from ...models.dsv3.moe_dsv3 import DeepseekV3Experts
from ..quantized_weights import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from .format import byte_tensors, packed_config, packed_tensors
from .loading import PARTS


OF_MTP_HEADS, EMBEDDINGS = r"re:.*shared_head\.head$", r"re:.*embed_tokens$"
QUANTIZED = (QuantizedLinear, QuantizedEmbedding, QuantizedExperts)


def _is_tied(model: Any, module: nn.Module) -> bool:
    """Whether a module is an embedding and a head's at once, or such a head.

    Checkpoints hold these weights once, and dequantised: Transformers cannot open them otherwise.
    """
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    return module in both and len({id(getattr(part, "weight", None)) for part in both}) == 1


def packed_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint: quantised weights by their official names, all else by the model's.

    MTP layers get the copies of the embedding and of the head that official checkpoints carry. A quantised embedding
    that is the head's too is dequantised, since nothing but this package could open it. Each quantised weight is
    packed anew, so that beside the model memory holds as much again.
    """
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, QUANTIZED):
            continue
        for leaf in ("weight", *PARTS):
            values, scale = tensors.pop(f"{name}.{leaf}", None), tensors.pop(f"{name}.{leaf}_scale", None)
            if values is None or scale is None:
                continue
            if _is_tied(model, module):
                if isinstance(module, QuantizedEmbedding):
                    tensors[f"{name}.{leaf}"] = dequantize(values, scale, model.dtype)
                continue
            pairs = [(f"{name}.{leaf}", values, scale)]
            if leaf in PARTS:
                parts = PARTS[leaf]
                pairs = [
                    (f"{name}.{e}.{part}.weight", *held)
                    for e in range(len(values))
                    for part, *held in zip(parts, values[e].chunk(len(parts)), scale[e].chunk(len(parts)))
                ]
            for weight, part_values, part_scale in pairs:
                official, whole = official_name(weight, model.config), whole_numbers(part_values)
                if isinstance(module, QuantizedEmbedding):
                    tensors |= byte_tensors(official, whole, part_scale)
                else:
                    tensors |= packed_tensors(official, whole, part_scale, module.stored_bits)
    return tensors | _mtp_copies(model, tensors)


def _mtp_copies(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config = text_config(model.config)
    base = model.decoder_prefix or ("" if model.base_model is model else f"{model.base_model_prefix}.")
    sources = {"embed_tokens": f"{base}embed_tokens."}
    head = model.get_output_embeddings()
    if head is not None:
        sources["shared_head.head"] = sources["embed_tokens"] if _is_tied(model, head) else "lm_head."
    return {
        f"{base}layers.{config.num_hidden_layers + depth}.{copy}.{name.removeprefix(source)}": tensor.clone()
        for depth in range(config.num_nextn_predict_layers or 0)
        for copy, source in sources.items()
        for name, tensor in tensors.items()
        if name.startswith(source)
    }


def packed_model_config(model: Any) -> dict[str, Any]:
    """`quantization_config` of that checkpoint."""
    bits: dict[str, int] = {}  # of experts by the name of their stack
    plain: list[str] = []
    embeddings: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        official = official_name(f"{name}.weight", model.config).removesuffix(".weight")
        if _is_tied(model, module):
            plain += [official] if module is model.get_output_embeddings() else []
        elif isinstance(module, QuantizedEmbedding):
            embeddings[module.stored_bits] = [EMBEDDINGS]
        elif isinstance(module, QUANTIZED):
            bits[official] = module.stored_bits
        elif isinstance(module, (nn.Linear, DeepseekV3Experts)):
            plain.append(official)
    return modules_config(bits, plain, embeddings)


def modules_config(bits: dict[str, int], plain: list[str], embeddings: dict[int, list[str]]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint by its modules.

    Args:
        bits: of linear layers, and of routed experts by the name of their stack. plain: those that are not quantised.
            Both by official names, copies in MTP layers left out.
        embeddings: as `packed_config` takes them.
    """
    experts = [held for name, held in bits.items() if name.endswith(".experts")]
    usual = Counter(experts or bits.values()).most_common(1)[0][0] if bits else 0
    targets: dict[int, list[str]] = defaultdict(list)
    for held in sorted(set(bits.values())):
        if held == usual:
            # The pattern tells native, whose routed experts are no linear layers, that their bits are these
            targets[held] = ["Linear"] + (
                [r"re:.*\.mlp\.experts\..*"] if experts and len(set(bits.values())) > 1 else []
            )
        else:
            names = [name for name, other in bits.items() if other == held]
            targets[held] = _patterns(names, [name for name in (*bits, *plain) if name not in names])
            if bits.get("lm_head") == held:
                targets[held].append(OF_MTP_HEADS)
    ignored = _patterns(plain, list(bits))
    if "lm_head" in plain:
        ignored.append(OF_MTP_HEADS)
    return packed_config(targets, ignored, embeddings)


def _patterns(names: list[str], others: list[str]) -> list[str]:
    """Targets that take modules and none of the others: a pattern where all layers have the same."""
    kept = {_in_layer(name) for name in others}
    found = []
    for name in names:
        inside = _in_layer(name)
        if name.endswith(".experts"):
            found.append(f"re:{re.escape(name)}\\." if inside in kept else rf"re:.*\.{re.escape(inside)}\.")
        elif inside == name or inside in kept or "experts" in inside:  # native looks for routed experts by that word
            found.append(name)
        else:
            found.append(rf"re:.*\.{re.escape(inside)}$")
    return list(dict.fromkeys(found))


def _in_layer(name: str) -> str:
    return re.sub(r"^.*\blayers\.\d+\.", "", name)
