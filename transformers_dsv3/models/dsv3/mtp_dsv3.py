"""Multi-token prediction (MTP), arXiv 2412.19437, section 2.2.

The layer of depth k sees, for each position i, the hidden state of depth k - 1 and the embedding of token i + k, and
predicts token i + k + 1 through the head it shares with the main model. Depths count from 0 in this code, so the layer
of depth 0 is fed token i + 1 and predicts token i + 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_dsv3 import DeepseekV3Config
from .decoder_dsv3 import DeepseekV3DecoderLayer
from .linear_dsv3 import linear
from .norm_dsv3 import DeepseekV3RMSNorm


# What official checkpoints repeat in each MTP layer
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


class Dsv3MtpHead(nn.Module):
    """The norm before the shared output head. Its own module for the official name `shared_head.norm`."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Dsv3MtpLayer(DeepseekV3DecoderLayer):
    """A decoder layer on the projected pair of a hidden state and the next token's embedding (equations 21 and 22).

    Layer `num_hidden_layers + depth` of the network and of the checkpoint, layer `depth` of the MTP cache. It is no
    layer of `model.layers`, which holds the main model's alone.
    """

    def __init__(self, config: DeepseekV3Config, depth: int):
        super().__init__(config, layer_idx=config.num_hidden_layers + depth, cache_idx=depth)
        # `enorm` and `hnorm` in checkpoints. Optimizers know by the name that these are norms, which no weight decay
        # is to pull towards zero.
        self.embed_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = Dsv3MtpHead(config)
        self.frozen_as_idle = False  # see `freeze_idle_mtp_layers` of objectives_dsv3

    @property
    def is_trained(self) -> bool:
        """Whether the layer is trained, as its projection tells: users and adapters freeze all of it or nothing."""
        return any(parameter.requires_grad for parameter in self.eh_proj.parameters())

    @property
    def enorm(self) -> nn.Module:
        """The norm of the embeddings, by its official name."""
        return self.embed_layernorm

    @property
    def hnorm(self) -> nn.Module:
        """The norm of the hidden states, by its official name."""
        return self.hidden_layernorm

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """`load_state_dict` of official checkpoints, which hold a copy of the shared embedding and head in each layer.

        `from_pretrained` leaves the copies out by `_keys_to_ignore_on_load_unexpected`, which `Trainer` does not
        consult when it resumes: it would warn of unexpected keys in the very file that it saved.
        """
        for name in COPIES:
            state_dict.pop(prefix + name, None)  # torch's own dictionary for this layer, not the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(  # type: ignore[override]
        self, previous_hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            previous_hidden_states: `(B, Q, D)`, the output of the main model or of the layer before, normalised.
            next_embeds: `(B, Q, D)`, embeddings of the tokens `depth + 1` places on.
            kwargs: those of [`DeepseekV3DecoderLayer`].

        Returns:
            `(B, Q, D)`, normalised, ready for the output head.
        """
        pair = torch.cat([self.embed_layernorm(next_embeds), self.hidden_layernorm(previous_hidden_states)], dim=-1)
        return self.shared_head.norm(super().forward(linear(self.eh_proj, pair), **kwargs))


def shift_left(tensor: torch.Tensor, places: int, fill: float) -> torch.Tensor:
    """Moves dimension 1 of `(B, S, ...)`: entry i of the result is entry i + places, or `fill` past the end."""
    rest = tensor[:, places:]
    return F.pad(rest, [0, 0] * (tensor.dim() - 2) + [0, tensor.shape[1] - rest.shape[1]], value=fill)


def same_sequence(
    like: torch.Tensor,
    places: int,
    position_ids: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(B, S)` bool: whether the token `places` on belongs to the same sequence as the one at each position.

    Args:
        like: `(B, S)`, read for its shape and device only.
        position_ids: `(B or 1, S)`; where they do not run on, another packed sequence begins.
        token_mask: `(B, S)`, False for padding, which belongs to no sequence.
    """
    inside = torch.ones_like(like, dtype=torch.bool) if token_mask is None else token_mask
    inside = inside & shift_left(inside, places, False)
    if position_ids is not None:
        inside = inside & (shift_left(position_ids, places, -1) == position_ids + places)
    return inside


def mtp_labels(
    labels: torch.Tensor,
    depth: int,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Targets of the MTP layer of one depth: entry i is token i + depth + 2.

    Args:
        labels: `(B, S)`, -100 where there is no target, not shifted.
        position_ids, attention_mask: `(B or 1, S)`, as in [`same_sequence`]; nothing is predicted across sequences or
            from padding.

    Returns:
        `(B, S)`, -100 where there is no target.
    """
    token_mask = attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
    inside = same_sequence(labels, depth + 2, position_ids, token_mask)
    return shift_left(labels, depth + 2, -100).masked_fill(~inside, -100)


# Positions of a training batch at which the draft of the next but one token is compared with the model's own, divided
# among its rows; one a row at least
COMPARED = 16


def second_token_acceptance(
    hidden_states: torch.Tensor, mtp_states: torch.Tensor, mtp_targets: torch.Tensor, head: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """On some positions of a batch, how often greedy decoding would accept the first MTP layer's draft.

    Args:
        hidden_states, mtp_states: `(B, S, D)`, of the main model and of the first MTP layer.
        mtp_targets: `(B, S)`, -100 where that layer predicts nothing.

    Returns:
        Positions compared and drafts accepted, fp32 scalars.
    """
    batch_size, length = mtp_targets.shape
    if length < 3:
        return torch.zeros(2, device=mtp_targets.device).unbind()
    per_row = min(max(COMPARED // batch_size, 1), length - 2)
    # Anywhere in a row, but only where there is a target: an order by multiples of the golden ratio, other in each row
    numbers = torch.arange(batch_size * length, dtype=torch.float64).mul_(0.6180339887498949).frac_()
    order = numbers.view(batch_size, length).to(mtp_targets.device, torch.float32)
    columns = torch.where(mtp_targets != -100, order, -1.0).topk(per_row, dim=1)[1]
    counted = mtp_targets.gather(1, columns) != -100

    def greedy(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return head(states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))).argmax(-1)

    accepted = greedy(mtp_states, columns) == greedy(hidden_states, (columns + 1).clamp(max=length - 1))
    return counted.sum().float(), (accepted & counted).sum().float()
