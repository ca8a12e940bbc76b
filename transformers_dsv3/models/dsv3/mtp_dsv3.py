"""Multi-token prediction (MTP), arXiv 2412.19437, section 2.2.

The layer of depth k sees, for each position i, the hidden state of depth k - 1 and the embedding of token i + k, and
predicts token i + k + 1 through the head it shares with the main model. Depths count from 0 in this code, so the layer
of depth 0 is fed token i + 1 and predicts token i + 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_dsv3 import Dsv3Config
from .decoder_dsv3 import Dsv3DecoderLayer
from .linear_dsv3 import Dsv3Linear
from .norm_dsv3 import Dsv3RMSNorm


class Dsv3MtpHead(nn.Module):
    """The norm before the shared output head. Its own module for the official name `shared_head.norm`."""

    def __init__(self, config: Dsv3Config):
        super().__init__()
        self.norm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Dsv3MtpLayer(Dsv3DecoderLayer):
    """A decoder layer on the projected pair of a hidden state and the next token's embedding (equations 21 and 22).

    Layer `num_hidden_layers + depth` of the network and of the checkpoint, layer `depth` of the MTP cache.
    """

    def __init__(self, config: Dsv3Config, depth: int):
        super().__init__(config, layer_idx=config.num_hidden_layers + depth, cache_idx=depth)
        self.enorm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Dsv3Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = Dsv3MtpHead(config)
        self.frozen_as_idle = False  # see `Dsv3PreTrainedModel._freeze_idle_mtp_layers`

    def forward(  # type: ignore[override]
        self, previous_hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            previous_hidden_states: `(B, Q, D)`, the output of the main model or of the layer before, normalised.
            next_embeds: `(B, Q, D)`, embeddings of the tokens `depth + 1` places on.
            kwargs: those of [`Dsv3DecoderLayer`].

        Returns:
            `(B, Q, D)`, normalised, ready for the output head.
        """
        pair = torch.cat([self.enorm(next_embeds), self.hnorm(previous_hidden_states)], dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(pair), **kwargs))


def shift_left(tensor: torch.Tensor, places: int, fill: float) -> torch.Tensor:
    """Moves dimension 1 of `(B, S, ...)`: entry i of the result is entry i + places, or `fill` past the end."""
    rest = tensor[:, places:]
    return F.pad(rest, [0, 0] * (tensor.dim() - 2) + [0, tensor.shape[1] - rest.shape[1]], value=fill)


def mtp_labels(
    labels: torch.Tensor,
    depth: int,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Targets of the MTP layer of one depth: entry i is token i + depth + 2.

    Args:
        labels: `(B, S)`, -100 where there is no target, not shifted.
        position_ids: `(B or 1, S)`; where they do not run on, another packed sequence begins and nothing is predicted
            across.
        attention_mask: `(B, S)`; nothing is predicted from padding.

    Returns:
        `(B, S)`, -100 where there is no target.
    """
    places = depth + 2
    targets = shift_left(labels, places, -100)
    if position_ids is not None:
        same_sequence = shift_left(position_ids, places, -1) == position_ids + places
        targets = targets.masked_fill(~same_sequence, -100)
    if attention_mask is not None and attention_mask.dim() == 2:
        targets = targets.masked_fill(attention_mask == 0, -100)
    return targets
