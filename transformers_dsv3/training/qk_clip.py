"""QK-clip: attention logits that grow past a threshold are brought back to it, head by head (Kimi K2, section 2.1).

Muon lets them grow where AdamW does not. A head's largest logit S over all that a step saw gives γ = min(1, τ/S): its
queries and keys without position are multiplied by √γ, its rotary queries by γ, and the rotary keys, which all heads
share, stay as they are. So that head's logits are multiplied by γ, and no other's change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..models.dsv3.attention_dsv3 import DeepseekV3Attention, dense_mask
from .metrics import MetricsCallback, require_base_model


# Scores that are held at a time while the largest is looked for
_SCORES = 2**23


@torch.no_grad()
def largest_logits(
    attention: DeepseekV3Attention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: Any = None,
) -> torch.Tensor:
    """The largest attention logit of each head, `(H,)` in fp32, of all pairs that may attend each other.

    Args:
        hidden_states: `(B, S, D)`, what attention is given in training: no cache.
        position_embeddings, attention_mask: as it takes them.
    """
    length = hidden_states.shape[1]
    cos, sin = position_embeddings
    if attention.q_lora_rank is None:
        query = attention.q_proj(hidden_states)
    else:
        query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
    widths = [attention.qk_nope_head_dim, attention.qk_rope_head_dim]
    q_nope, q_rope = query.unflatten(-1, (-1, attention.qk_head_dim)).transpose(1, 2).split(widths, dim=-1)
    latent, k_rope = attention.kv_a_proj_with_mqa(hidden_states).split(
        [attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
    )
    keys = attention.kv_b_proj(attention.kv_a_layernorm(latent))
    k_nope = keys.unflatten(-1, (query.shape[-1] // attention.qk_head_dim, -1)).transpose(1, 2)
    k_nope = k_nope[..., : attention.qk_nope_head_dim]
    q_rope, k_rope = attention._rotate(q_rope, cos, sin), attention._rotate(k_rope.unsqueeze(1), cos, sin)
    mask = dense_mask(attention_mask, length, length, hidden_states.device)
    rows = max(1, _SCORES // (k_nope.shape[0] * k_nope.shape[1] * length))
    largest = torch.full((k_nope.shape[1],), -torch.inf, device=hidden_states.device)
    for start in range(0, length, rows):
        here = slice(start, start + rows)
        scores_BHQS = q_nope[:, :, here] @ k_nope.mT + q_rope[:, :, here] @ k_rope.mT
        if mask is not None:
            part = mask[:, :, here] if mask.shape[2] > 1 else mask
            # Additive ones have the lowest finite value where nothing may be attended
            allowed = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            scores_BHQS = scores_BHQS.masked_fill(~allowed, -torch.inf)
        largest = torch.maximum(largest, scores_BHQS.float().amax(dim=(0, 2, 3)))
    return largest * attention.scaling


@torch.no_grad()
def clip_heads(attention: DeepseekV3Attention, factors_H: torch.Tensor) -> None:
    """Multiplies the logits of each head by a factor, by its weights of queries and keys.

    Args:
        factors_H: from 0 to 1.
    """
    queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    root_H = factors_H.sqrt()
    nope, rope, value = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    of_queries = torch.cat([root_H[:, None].expand(-1, nope), factors_H[:, None].expand(-1, rope)], dim=1)
    of_keys = torch.cat([root_H[:, None].expand(-1, nope), torch.ones_like(root_H)[:, None].expand(-1, value)], dim=1)
    for weight, factors in ((queries.weight, of_queries), (attention.kv_b_proj.weight, of_keys)):
        rows = factors.reshape(-1, 1).expand(weight.shape).to(weight.dtype)
        if isinstance(weight, DTensor):
            # Every process has all factors: each takes its part
            part = distribute_tensor(rows.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None)
            weight.to_local().mul_(part.to_local())
        else:
            weight.mul_(rows)


class QkClipCallback(MetricsCallback):
    """Keeps attention logits below a threshold while `Trainer` trains, Kimi K2's QK-clip.

    ```python
    Trainer(model=model, args=args, optimizer_cls_and_kwargs=muon(lr=2e-3), callbacks=[QkClipCallback()])
    ```

    The largest logit of each head is computed beside attention, from the same inputs, whatever computes attention:
    the products of queries and keys once more, without a gradient. Of heads above the threshold the weights are scaled
    after the optimizer's step. Logged with every training loss: `attention/max_logit`, and `attention/clipped_heads`,
    how many were above in all steps since the last log.

    Args:
        threshold: τ.
        every: at every how many steps logits are looked at.

    Raises:
        ValueError: for arguments out of range; and when training begins, for models whose projections are adapted or
            quantised, and for tensor parallelism.
    """

    def __init__(self, threshold: float = 100.0, every: int = 1):
        if not threshold > 0:
            raise ValueError(f"`threshold={threshold!r}` must be above 0.")
        if every < 1:
            raise ValueError(f"`every={every!r}` must be at least 1.")
        self.threshold = threshold
        self.every = every
        self.is_looking = False
        self.largest: dict[DeepseekV3Attention, torch.Tensor] = {}
        self.handles: list[Any] = []
        self.max_logit: float | None = None
        self.clipped = 0

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        require_base_model(model, type(self).__name__)
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError("QkClipCallback does not know which heads a tensor-parallel process has: leave it out.")
        for attention in attentions(model):
            queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
            for projection in (queries, attention.kv_b_proj):
                if type(projection) is not nn.Linear:
                    raise ValueError(
                        f"QkClipCallback scales the weights of queries and keys, and one is a {type(projection)}: "
                        "leave it out with adapters and quantised weights."
                    )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._remove_hooks()  # of a run that was interrupted
        self.largest, self.max_logit, self.clipped = {}, None, 0
        for attention in attentions(kwargs["model"]):
            self.handles.append(attention.register_forward_pre_hook(self._look, with_kwargs=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_looking = state.global_step % self.every == 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.is_looking:
            return
        self.is_looking = False
        # In the model's order, so that all ranks reduce the same. MTP layers may not have run, nor others' stages
        layers = attentions(kwargs["model"])
        nothing = torch.full((layers[0].num_heads,), -torch.inf, device=args.device)
        largest_LH = torch.stack([self.largest.get(layer, nothing) for layer in layers])
        self.largest = {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX)
        greatest = float(largest_LH.max())
        self.max_logit = greatest if self.max_logit is None else max(self.max_logit, greatest)
        for attention, largest_H in zip(layers, largest_LH):
            above_H = largest_H > self.threshold
            weight = attention.kv_b_proj.weight
            if weight.requires_grad and above_H.any():
                self.clipped += int(above_H.sum())
                if not weight.is_meta:  # of another rank's stage
                    factors_H = torch.where(above_H, self.threshold / largest_H, torch.ones_like(largest_H))
                    clip_heads(attention, factors_H)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()
        super().on_train_end(args, state, control, **kwargs)

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        figures = {"attention/clipped_heads": float(self.clipped)}
        if self.max_logit is not None:
            figures["attention/max_logit"] = self.max_logit
        self.max_logit, self.clipped = None, 0
        return figures

    def _look(self, attention: DeepseekV3Attention, arguments: tuple, kwargs: dict[str, Any]) -> None:
        if not (self.is_looking and attention.training):
            return
        given = dict(zip(("hidden_states", "position_embeddings", "attention_mask"), arguments)) | kwargs
        largest_H = largest_logits(
            attention, given["hidden_states"], given["position_embeddings"], given.get("attention_mask")
        )
        before = self.largest.get(attention)
        self.largest[attention] = largest_H if before is None else torch.maximum(before, largest_H)

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def attentions(model: nn.Module) -> list[DeepseekV3Attention]:
    """The attention of every layer, MTP layers' last."""
    return [module for module in model.modules() if isinstance(module, DeepseekV3Attention)]
