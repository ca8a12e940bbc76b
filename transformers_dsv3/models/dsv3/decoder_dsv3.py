"""The decoder layer of DeepSeek-V3 models."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from .attention_dsv3 import DeepseekV3Attention
from .configuration_dsv3 import DeepseekV3Config
from .linear_dsv3 import DeepseekV3MLP
from .moe_dsv3 import DeepseekV3MoE
from .norm_dsv3 import DeepseekV3RMSNorm
from .training_pass_dsv3 import pass_of


NATIVE_FORWARD = native.DeepseekV3DecoderLayer.forward


class DeepseekV3DecoderLayer(native.DeepseekV3DecoderLayer):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Args:
        layer_idx: position in the network, which decides between a dense network and a mixture of experts.
        cache_idx: position in the cache, `layer_idx` unless given.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int, cache_idx: int | None = None):
        GradientCheckpointingLayer.__init__(self)  # not the parent's, which makes native's modules
        self.hidden_size = config.hidden_size
        self.self_attn = DeepseekV3Attention(config, layer_idx if cache_idx is None else cache_idx)
        self.mlp = DeepseekV3MoE(config) if config.is_moe(layer_idx) else DeepseekV3MLP(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`(B, Q, D)` to `(B, Q, D)`. The other arguments are those of [`DeepseekV3Attention`], and native's."""
        if native.DeepseekV3DecoderLayer.forward is not NATIVE_FORWARD:  # what somebody has put there
            given = (attention_mask, position_ids, past_key_values, use_cache, position_embeddings)
            return super().forward(hidden_states, *given, **kwargs)
        hidden_states = self.attend(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self.feed_forward(hidden_states, position_ids)

    def attend(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The first half, attention: `(B, Q, D)` to `(B, Q, D)`. Arguments are those of `forward`, by name."""
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attention

    def feed_forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The second half, the dense network or the mixture of experts: `(B, Q, D)` to `(B, Q, D)`.

        Args:
            position_ids: those of the pass, by which routers in training know it.
        """
        normalised = self.post_attention_layernorm(hidden_states)
        if not self.training:
            return hidden_states + self.mlp(normalised)
        # Gradient checkpointing computes a layer again when its pass is long over
        with pass_of(position_ids):
            return hidden_states + self.mlp(normalised)


Dsv3DecoderLayer = DeepseekV3DecoderLayer  # its name before
