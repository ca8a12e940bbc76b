"""Inference engines that build a model of Transformers and then write its modules anew."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native


# What the engines call the attention that they put in place of Transformers'. vLLM's Transformers backend parses the
# source of each module's forward, finds in it the names that native's uses, and compiles another from it; SGLang's
# replaces the layers. Only of native's own source do they make what they make of `deepseek_v3`.
ENGINES = ("vllm", "sglang")


def engine_layer(config: Any) -> type[nn.Module] | None:
    """Native's decoder layer where one of those engines builds the model, else None.

    The engine brings its own kernels, cache and, for drafts, MTP layers: none of the plugin's would be run.
    """
    implementation = getattr(config, "_attn_implementation", None)
    name = implementation if isinstance(implementation, str) else ""
    return native.DeepseekV3DecoderLayer if name.startswith(ENGINES) else None
