"""`quantize`: the weights of a loaded model to 8 or 4 bits, in place."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..kernels.cpu.operators import GROUP
from ..models.dsv3.moe_dsv3 import DeepseekV3Experts
from .packed.quantizer import PackedWeightsConfig, PackedWeightsQuantizer
from .quantized_weights import (
    ROUNDED_DTYPES,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    quantize_groups,
)


def _input_widths(module: nn.Module) -> list[int]:
    """Along what its weights are put in groups."""
    if isinstance(module, DeepseekV3Experts):
        return [module.gate_up_proj.shape[-1], module.down_proj.shape[-1]]
    return [module.weight.shape[-1]]  # type: ignore[union-attr,list-item]


def _places(model: nn.Module, bits: int, head_bits: int | None) -> dict[str, int]:
    """Names of the modules to quantise and their bits, an embedding before a head that is tied to it."""
    heads = {id(model.get_output_embeddings()) if isinstance(model, PreTrainedModel) else None}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, int | None] = {}
    text = getattr(model, "decoder_prefix", "")  # beside which a vision tower and its projector stay as they are
    for name, module in model.named_modules():
        if not name.startswith(text) and id(module) not in heads:
            continue
        if isinstance(module, DeepseekV3Experts):
            found[name] = bits
        elif isinstance(module, nn.Embedding):
            found[name] = head_bits
        elif isinstance(module, nn.Linear) and not name.endswith("kv_b_proj"):
            found[name] = head_bits if id(module) in heads or id(module.weight) in embeddings else bits
    return {name: wanted for name, wanted in found.items() if wanted is not None}


def quantize(
    model: PreTrainedModel,
    bits: int = 8,
    head_bits: int | None = 8,
    activations: str | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Rounds the weights of a model to 8 or 4 bits in groups of 32, in place and layer by layer.

    Linear layers and routed experts are rounded, those of MTP layers too, and the embedding and the head as
    `head_bits` says; a head that is tied to the embedding shares its weights still. Norms, routers and `kv_b_proj`,
    which is folded into the queries when decoding, stay as they are, as do a vision tower and its projector. So do
    layers whose input is not a multiple of 32 wide: a warning names them. Each layer is freed as soon as it is
    replaced, so that no second model is held.

    Args:
        model: a model of this package. It is saved as compressed-tensors' `pack-quantized` format, which
            `from_pretrained` opens as it is. Adapters can be trained on it, its weights cannot.
        bits: 8 or 4, of linear layers and experts: the values of GGUF's Q8_0 and Q4_0.
        head_bits: 8 or 4, of the embedding and the head; None leaves them.
        activations: "8" rounds activations to 8 bits in groups of 32 where they meet quantised weights, which is
            fastest; "16" leaves them whole. None, the default: 8 bits in bf16, whole in fp32. Only the compiled CPU
            backend rounds them.
        progress: whether to show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: for other bits or activations, a model that is quantised already or has nothing to quantise, and
            weights that are not finite or too large; names what is wrong. Nothing is changed then, but for bad
            weights, of which the layers before are quantised.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is 4 or 8, not {bits!r}.")
    if head_bits not in (4, 8, None):
        raise ValueError(f"head_bits is 4, 8 or None, not {head_bits!r}.")
    if activations not in ROUNDED_DTYPES:
        raise ValueError(f"activations is '8', '16' or None, not {activations!r}.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantised already.")
    places = _places(model, bits, head_bits)
    odd = {}
    for name in places:
        if wrong := [width for width in _input_widths(model.get_submodule(name)) if width % GROUP]:
            odd[name] = wrong[0]
    if len(odd) == len(places):
        named = "; ".join(f"{name} has an input of {width}" for name, width in list(odd.items())[:3])
        raise ValueError(f"No layer can be quantised: inputs have to be multiples of {GROUP} wide, {named or 'none'}.")
    if odd:
        named = ", ".join(f"{name} ({width})" for name, width in odd.items())
        warnings.warn(f"Layers whose input is not a multiple of {GROUP} wide stay as they are: {named}", stacklevel=2)
    # Of weights that several layers share, such as a tied head's
    shared: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    names = [name for name in places if name not in odd]
    for name in tqdm(names, desc=f"{bits} bits", unit="layer", disable=not progress):
        module = model.get_submodule(name)
        try:
            quantized = _quantized(module, places[name], activations, shared)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}.") from error
        model.set_submodule(name, quantized.train(module.training))
    mark_quantized(model, activations)
    return model


def mark_quantized(model: PreTrainedModel, activations: str | None = None) -> None:
    """Tells Transformers of a model with layers of `quantized_weights`, and how it is saved."""
    quantizer = model.hf_quantizer = PackedWeightsQuantizer(PackedWeightsConfig(activations))
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    quantizer.describe(model)


def _quantized(module: nn.Module, bits: int, activations: str | None, shared: dict) -> nn.Module:
    if isinstance(module, DeepseekV3Experts):
        return QuantizedExperts(module, bits, activations)
    weight = module.weight
    is_embedding = isinstance(module, nn.Embedding)
    values, scale = shared.get(id(weight)) or quantize_groups(weight, bits)  # type: ignore[arg-type]
    made: QuantizedEmbedding | QuantizedLinear
    if is_embedding:
        made = QuantizedEmbedding(values, scale, module)  # type: ignore[arg-type]
    else:
        made = QuantizedLinear(values, scale, module.bias, activations)  # type: ignore[arg-type]
    if is_embedding:
        shared[id(weight)] = (made.weight, scale)
    return made


def quantize_int8(model: PreTrainedModel, activations: str = "bf16", progress: bool = False) -> PreTrainedModel:
    """`quantize(model, bits=8)` under its name before; the next release has it no more.

    Args:
        model, progress: as `quantize` takes them.
        activations: "bf16", which leaves them whole, or "int8".

    Raises:
        ValueError: for other activations, and as `quantize` does.
    """
    warnings.warn("quantize_int8 is now quantize(model, bits=8)", FutureWarning, stacklevel=2)
    if activations not in ("bf16", "int8"):
        raise ValueError(f"activations is 'bf16' or 'int8', not {activations!r}.")
    return quantize(model, activations="16" if activations == "bf16" else "8", progress=progress)
