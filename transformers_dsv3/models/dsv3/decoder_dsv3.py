"""The decoder layer of DeepSeek-V3 models."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_dsv3 import Dsv3Attention
from .configuration_dsv3 import Dsv3Config
from .linear_dsv3 import Dsv3MLP
from .moe_dsv3 import Dsv3MoE
from .norm_dsv3 import Dsv3RMSNorm
from .training_pass_dsv3 import TrainingPass


class Dsv3DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Args:
        layer_idx: position in the network, which decides between a dense network and a mixture of experts.
        cache_idx: position in the cache, `layer_idx` unless given.
    """

    def __init__(self, config: Dsv3Config, layer_idx: int, cache_idx: int | None = None):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = Dsv3Attention(config, layer_idx if cache_idx is None else cache_idx)
        self.is_moe = layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0
        self.mlp = Dsv3MoE(config) if self.is_moe else Dsv3MLP(config)
        self.input_layernorm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        training_pass: TrainingPass | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`(B, Q, D)` to `(B, Q, D)`.

        `training_pass` and `token_mask` are those of [`Dsv3TopkRouter`], the others those of [`Dsv3Attention`].
        """
        attention, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        normalised = self.post_attention_layernorm(hidden_states)
        if training_pass is not None and self.is_moe:
            return hidden_states + self.mlp(normalised, training_pass, token_mask)
        return hidden_states + self.mlp(normalised)
