"""Models of random weights in the shapes that are worth timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..compression.published_shapes import PUBLISHED
from ..models.dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM
from ..option_error import OptionError
from .devices import Device
from .settings import BenchSettings


@dataclass(frozen=True)
class Preset:
    """A shape.

    Args:
        about: one line for the help.
        fields: of `DeepseekV3Config`.
        always_mtp: whether it has its MTP layer also where nothing that uses it is measured.
    """

    about: str
    fields: dict[str, Any]
    always_mtp: bool = False


_HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_ROUTING = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1}

PRESETS = {
    "bench-2b": Preset(
        "1.94 B parameters: DeepSeek-V3's attention and routing, 4 layers, 64 experts of which 6 a token",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "q_lora_rank": 768,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            **_HEADS,
            **_ROUTING,
        },
    ),
    "moonlight": Preset(
        "the shape of Moonlight-16B-A3B, with as many of its 27 layers as memory takes (or --layers)",
        PUBLISHED["moonlight-16b-a3b"],
    ),
    "small": Preset(
        "107 M parameters with an MTP layer, for training steps and for trying the command",
        {
            "vocab_size": 16000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "moe_intermediate_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "q_lora_rank": 256,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            **_ROUTING,
        },
        always_mtp=True,
    ),
}

# Weights beside which caches, activations and the ceilings' buffer still have room
SHARE_OF_MEMORY = 0.7


def preset_config(
    settings: BenchSettings, free_bytes: int, copies: float = 1.0
) -> tuple[DeepseekV3Config, str | None]:
    """The configuration of a preset, cut to fit memory where it must be.

    Args:
        free_bytes: memory that is free now where the model is to lie.
        copies: how often the weights are in memory at the same time.

    Returns:
        The configuration, and how it was cut in words (None where it was not).

    Raises:
        OptionError: where not even two layers fit.
    """
    preset = PRESETS[settings.source]
    mtp = int(preset.always_mtp or "mtp" in settings.what)
    whole = preset.fields["num_hidden_layers"]
    layers = settings.layers if settings.layers is not None else whole
    wide = 4 if "fp32" in settings.dtypes else 2
    budget = int(free_bytes * SHARE_OF_MEMORY)

    def config(layers: int) -> DeepseekV3Config:
        fields = {**preset.fields, "num_hidden_layers": layers, "num_nextn_predict_layers": mtp}
        positions = max(settings.longest, 4096)
        return DeepseekV3Config(**fields, max_position_embeddings=positions, bos_token_id=0, eos_token_id=1)

    def needed(layers: int) -> float:
        return parameter_count(config(layers)) * wide * copies

    asked = layers
    if settings.layers is None:
        while layers > 2 and needed(layers) > budget:
            layers -= 1
    if needed(layers) > budget:
        raise OptionError(
            "--layers" if settings.layers is not None else "CHECKPOINT_OR_PRESET",
            f"{layers} layers of {settings.source} need {needed(layers) / 2**30:.1f} GiB for {_times(copies)}weights, "
            f"and {SHARE_OF_MEMORY:.0%} of the memory that is free here is {budget / 2**30:.1f} GiB",
        )
    if layers == whole:
        return config(layers), None
    reason = "asked for" if asked == layers else "what memory takes"
    return config(layers), f"{layers} of {whole} layers, {reason}"


def _times(copies: float) -> str:
    return "" if copies == 1 else f"{copies:g} copies of "


def parameter_count(config: DeepseekV3Config) -> int:
    """Parameters of a model of this configuration, none of which is allocated."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_model(
    config: DeepseekV3Config, dtype: torch.dtype, seed: int, device: Device | None = None
) -> DeepseekV3ForCausalLM:
    """A model of random weights as Transformers initialises them, made where it is to run, in evaluation mode."""
    torch.manual_seed(seed)
    with (device or Device()).torch:
        return DeepseekV3ForCausalLM._from_config(config, dtype=dtype).eval()
