"""DeepSeekMoE with auxiliary-loss-free routing (arXiv 2412.19437, section 2.1.2).

Shape suffixes: T tokens, E routed experts, K experts chosen a token, G groups, D hidden size, I width of an expert.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels.backends import ADAPTED, MIXTURE, ROUTER
from ...kernels.dispatch import serve
from ...kernels.experts_auto import GROUPED_MM
from ...kernels.selection import PLAIN_CLASSES, register_plain, switched_off
from .adapted_experts_dsv3 import adapted_experts
from .configuration_dsv3 import DeepseekV3Config
from .linear_dsv3 import DeepseekV3MLP
from .training_pass_dsv3 import CarriedLoss, current_router_pass


NATIVE_ROUTER_FORWARD = native.DeepseekV3TopkRouter.forward


class DeepseekV3TopkRouter(native.DeepseekV3TopkRouter):
    """Scores the experts for each token and chooses `num_experts_per_tok` of them.

    Choice is by sigmoid score plus `e_score_correction_bias`, within the best groups; the weights that mix the chosen
    experts are the scores without the bias (equations 12 to 16). All of it is computed in fp32, autocast or not.

    Attributes:
        tokens_per_expert: `(E,)` int64, how many tokens chose each expert in training since they were last taken, or
            None. No buffer: DistributedDataParallel would replace every rank's counts by the first's.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV3Config):
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.num_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self.tokens_per_expert: torch.Tensor | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> "DeepseekV3TopkRouter":
        """Follows `.to`, `.half` and the like, but the correction bias stays in fp32.

        It moves by steps of 0.001 while training, which bf16 cannot represent near 1.
        """
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:
            exact = torch.empty_like(after, dtype=torch.float32) if after.is_meta or before.is_meta else None
            self.e_score_correction_bias = before.to(after.device, torch.float32) if exact is None else exact
        return self

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Indices `(T, K)` of the experts chosen for sigmoid scores `(T, E)`, in no particular order."""
        biased_TE = scores_TE + self.e_score_correction_bias
        if self.num_group > 1:
            grouped_TGe = biased_TE.unflatten(-1, (self.num_group, -1))
            group_scores_TG = grouped_TGe.topk(2, dim=-1)[0].sum(dim=-1)
            groups = group_scores_TG.topk(self.topk_group, dim=-1, sorted=False)[1]
            dropped_TG = torch.ones_like(group_scores_TG).scatter(1, groups, 0).bool()
            biased_TE = grouped_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_TE.topk(self.top_k, dim=-1, sorted=False)[1]

    def count(self, indices_TK: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """Adds the choices of one forward pass to `tokens_per_expert`."""
        if self.tokens_per_expert is None or self.tokens_per_expert.device != indices_TK.device:
            self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=indices_TK.device)
        ones_TK = (
            torch.ones_like(indices_TK) if token_mask is None else token_mask[:, None].expand_as(indices_TK).long()
        )
        self.tokens_per_expert.scatter_add_(0, indices_TK.flatten(), ones_TK.flatten())

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(..., D)`. In a pass of a model in training the choices are kept and counted.

        Returns:
            Router logits `(T, E)` before the sigmoid, mixing weights `(T, K)`, both fp32, and expert indices `(T, K)`.
        """
        if self.e_score_correction_bias.dtype.itemsize < 4:
            raise RuntimeError(
                f"e_score_correction_bias is {self.e_score_correction_bias.dtype}, its fp32 values are lost. FSDP's "
                "MixedPrecision(buffer_dtype=...) casts buffers: leave buffer_dtype unset, or use FSDP2."
            )
        if native.DeepseekV3TopkRouter.forward is not NATIVE_ROUTER_FORWARD:
            return super().forward(hidden_states)  # what somebody has put there
        routed = serve(
            ROUTER,
            self,
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            self.weight,
            self.e_score_correction_bias,
            self.num_group,
            self.topk_group,
            self.top_k,
            self.norm_topk_prob,
            self.routed_scaling_factor,
        )
        if routed is not None:
            return routed
        router_pass = current_router_pass() if self.training else None
        training_pass = None if router_pass is None else router_pass.training_pass
        token_mask = None if router_pass is None else router_pass.token_mask
        # Of the meta device PyTorch knows no autocast
        with nullcontext() if hidden_states.is_meta else torch.autocast(hidden_states.device.type, enabled=False):
            hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
            logits_TE = F.linear(hidden_TD, self.weight.float())
            scores_TE = logits_TE.sigmoid()
            indices_TK = None if training_pass is None else training_pass.choices.get(self)
            if indices_TK is None:
                with torch.no_grad():
                    indices_TK = self.choose(scores_TE)
                    if training_pass is not None:
                        training_pass.choices[self] = indices_TK
                        self.count(indices_TK, token_mask)
            if training_pass is not None:
                balance_loss = training_pass.sequence_balance_loss(scores_TE, self.top_k, token_mask)
                if balance_loss is not None:
                    scores_TE = CarriedLoss.apply(
                        scores_TE, balance_loss, training_pass, training_pass.seq_aux_loss_weight
                    )
            weights_TK = scores_TE.gather(1, indices_TK)
            if self.norm_topk_prob:
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
            return logits_TE, weights_TK * self.routed_scaling_factor, indices_TK


@use_experts_implementation
class DeepseekV3Experts(native.DeepseekV3Experts):
    """The routed experts, SwiGLU networks whose weights are stacked, `(E, 2I, D)` (gate above up) and `(E, D, I)`.

    Served by the implementation that `config._experts_implementation` names in Transformers' `ExpertsInterface`;
    `forward` here is the plain reference, `"eager"`.
    """

    def __init__(self, config: DeepseekV3Config):
        nn.Module.__init__(self)
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """`load_state_dict` of official checkpoints, which hold one tensor an expert, a whole one or shard by shard.

        `Trainer` resumes so, and would silently leave the experts as they are when their names are not known here.
        """
        parts = ("gate_proj", "up_proj", "down_proj")
        names = {f"{prefix}{expert}.{part}.weight" for expert in range(self.num_experts) for part in parts}
        # Before anything is looked at in the parameters: DeepSpeed's ZeRO-3 has pieces of them here
        if not names & state_dict.keys():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        places = {
            f"{prefix}{expert}.{name}.weight": place
            for expert in range(self.num_experts)
            for name, place in (
                ("gate_proj", self.gate_up_proj.detach()[expert, : self.intermediate_dim]),
                ("up_proj", self.gate_up_proj.detach()[expert, self.intermediate_dim :]),
                ("down_proj", self.down_proj.detach()[expert]),
            )
        }
        for name, place in places.items():
            stored = state_dict.get(name)
            if stored is None:
                missing_keys.append(name)
            elif stored.shape != place.shape:
                error_msgs.append(f"{name} has shape {tuple(stored.shape)}, not {tuple(place.shape)}")
            else:
                place.copy_(stored)
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in places)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(T, D)`.
            top_k_index, top_k_weights: `(T, K)`. Under expert parallelism, index E marks an expert of another rank.

        Returns:
            `(T, D)`, the weighted sum of the chosen experts' outputs, accumulated in fp32.
        """
        num_tokens, top_k = top_k_index.shape
        # Pairs of a token and an expert, sorted by expert
        experts, pairs = top_k_index.flatten().sort(stable=True)
        per_expert = torch.bincount(experts, minlength=self.num_experts).tolist()
        outputs, start = [], 0
        for expert, count in enumerate(per_expert):
            tokens = pairs[start : start + count] // top_k
            start += count
            if expert >= self.num_experts:
                outputs.append(hidden_states.new_zeros(count, self.hidden_dim))
            elif count:
                gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append(F.linear(self.act_fn(gate) * up, self.down_proj[expert]))
        if not outputs:
            return torch.zeros_like(hidden_states)  # no tokens
        by_pair = torch.cat(outputs)[pairs.argsort()].view(num_tokens, top_k, self.hidden_dim)
        return (by_pair * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


register_plain("experts", DeepseekV3Experts, native.DeepseekV3Experts)
NATIVE_FORWARD, NATIVE_EXPERTS_FORWARD = native.DeepseekV3MoE.forward, native.DeepseekV3Experts.forward


class DeepseekV3MoE(native.DeepseekV3MoE):
    """Routed experts plus shared experts that every token passes through (equation 12)."""

    def __init__(self, config: DeepseekV3Config):
        nn.Module.__init__(self)
        self.config = config
        self.experts = DeepseekV3Experts(config)
        self.gate = DeepseekV3TopkRouter(config)
        # Several shared experts are one wider network. Of width 0 it is kept, since the official layout has it.
        self.shared_experts = DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, D)` to `(B, S, D)`."""
        if native.DeepseekV3MoE.forward is not NATIVE_FORWARD:
            return super().forward(hidden_states)  # what somebody has put there
        _, weights, indices = self.gate(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        has_shared = getattr(self.shared_experts, "intermediate_size", 1) > 0
        plain = self.experts
        if type(plain) not in PLAIN_CLASSES:
            plain = switched_off(plain)  # PEFT's adapters are modules around them
        if has_shared and PLAIN_CLASSES.get(type(plain), ("",))[0] == "experts":
            asked_for = plain.config._experts_implementation
            if asked_for == "cpu" or (asked_for == "auto" and ALL_EXPERTS_FUNCTIONS["grouped_mm"] is GROUPED_MM):
                mixed = serve(MIXTURE, self, flat, plain, indices, weights, self.shared_experts)
                if mixed is not None:
                    return mixed.view(hidden_states.shape)
        if native.DeepseekV3Experts.forward is not NATIVE_EXPERTS_FORWARD:  # what somebody has put there
            routed = native.DeepseekV3Experts.forward(self.experts, flat, indices, weights)
        elif (adapted := adapted_experts(self.experts)) is None:
            routed = self.experts(flat, indices, weights)
        else:
            experts, added = adapted
            adapters = (added.get("gate_up_proj"), added.get("down_proj"))
            routed = serve(ADAPTED, experts, flat, experts, indices, weights, *adapters)
        routed = routed.view(hidden_states.shape)
        return routed + self.shared_experts(hidden_states) if has_shared else routed


Dsv3TopkRouter, Dsv3Experts, Dsv3MoE = DeepseekV3TopkRouter, DeepseekV3Experts, DeepseekV3MoE  # their names before
