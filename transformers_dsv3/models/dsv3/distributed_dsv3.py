"""DeepSeek-V3 models over several processes, by Transformers' tensor-, expert- and data-parallel plans.

The plans are those of `DeepseekV3Config` and of the model classes; Transformers applies them. Here is what they leave
open: expert parallelism asked for alone, sizes that do not divide, and the MTP layers' copies in checkpoints.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.distributed import DistributedConfig


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class Dsv3DistributedMixin(_Base):
    """How the models are sharded when loaded with `distributed_config=`; goes in front of `PreTrainedModel`."""

    _tp_plan: dict[str, str]

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        # Queries come from one layer or from two. Transformers warns of rules that name nothing.
        absent = "q_b_proj" if self.config.q_lora_rank is None else "q_proj"
        for plan in ("_tp_plan", "_ep_plan"):
            rules = getattr(self, plan, None)
            if rules:
                kept = {
                    name: style
                    for name, style in rules.items()
                    if name.split(".")[-1] != absent and self._has_layers_like(name)
                }
                setattr(self, plan, kept)

    def _has_layers_like(self, rule: str) -> bool:
        """Whether the model has MTP layers of the kind that a rule is for; true for rules of other layers."""
        if "mtp." not in rule:
            return True
        is_dense = self.config.num_hidden_layers < self.config.first_k_dense_replace
        for_dense = re.search(r"\.mlp\.\w+_proj$", rule) is not None
        return self.config.num_nextn_predict_layers > 0 and (".mlp." not in rule or for_dense == is_dense)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' step from `distributed_config` to meshes; a dictionary may ask for `ep_size` alone.

        The experts are then divided over `ep_size` processes, each of which has batches of its own, and everything
        else is sharded over all processes by FSDP2. [`DistributedConfig`] itself refuses that before a model sees it:
        it lets experts be divided over the ranks of its `fsdp_size` and `tp_size` only, which are 1 unless given.

        Raises:
            ValueError: for `pp_size`, whose layers that are elsewhere these models do not have.
        """
        given = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or object)
        if (given.get("pp_size") or 1) > 1:
            raise ValueError(
                "`pp_size`: Transformers' pipelines are for inference and do not take MTP layers; train by "
                "`transformers_dsv3.PipelineTrainer`, which cuts a model that was loaded whole"
            )
        if isinstance(distributed_config, dict):
            distributed_config = with_data_parallel_size(distributed_config)
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """Transformers' step between the model on the meta device and its shards.

        Raises:
            ValueError: for sizes that do not divide evenly, naming the field of the model's config.
        """
        if mesh is not None:
            check_divisible(model.config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh)

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict[str, Any], distributed_config: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Whole tensors on the process that writes, with the MTP layers' copies of embedding and head; else nothing.

        All processes call it. The copies are made here since `save_pretrained` sees shards before, and nothing after.
        Tied weights, which it would know by their storage, are left out here: once gathered they share it no more.
        """
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, distributed_config, **kwargs)
        if gathered is state_dict:
            return gathered  # nothing was sharded, `save_pretrained` has made the copies
        tied = getattr(model_to_save, "all_tied_weights_keys", None) or {}
        whole = model_to_save._with_mtp_copies(gathered)
        return {name: tensor for name, tensor in whole.items() if tied.get(name) not in whole}


def with_data_parallel_size(distributed_config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `DistributedConfig`, with the `fsdp_size` that an `ep_size` given alone needs.

    Raises:
        ValueError: where this version of Transformers has no `ep_size`, which it would leave out without a word.
    """
    if (distributed_config.get("ep_size") or 1) == 1:
        return distributed_config
    if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
        raise ValueError(
            "`ep_size`: this version of Transformers divides experts by "
            "DistributedConfig(tp_size=N, enable_expert_parallel=True) only; see examples/parallel.md"
        )
    if distributed_config.get("fsdp_size") is not None or (distributed_config.get("tp_size") or 1) > 1:
        return distributed_config
    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if is_initialized else int(os.environ.get("WORLD_SIZE", 1))
    others = (distributed_config.get("pp_size") or 1) * (distributed_config.get("dp_replicate_size") or 1)
    return {**distributed_config, "fsdp_size": processes // others}


def check_divisible(config: Any, distributed_config: Any) -> None:
    """Refuse sizes that would be cut within a head or an expert.

    Raises:
        ValueError: naming the field and the rule.
    """
    tp_size = distributed_config.tp_size or 1
    by_experts = getattr(distributed_config, "ep_size", None) or 1
    if by_experts == 1 and getattr(distributed_config, "enable_expert_parallel", False):
        by_experts = tp_size  # Transformers without `ep_size`, where the plan of experts replaces the other one
        tp_size = 1
    rules = [("num_attention_heads", tp_size, "tp_size"), ("n_routed_experts", by_experts, "ep_size")]
    if by_experts == 1:
        rules.append(("moe_intermediate_size", tp_size, "tp_size"))
    if not config.n_shared_experts and (getattr(distributed_config, "dp_size", None) or 1) > 1:
        raise ValueError(
            "`n_shared_experts=0`: Transformers cannot load weights of no size, which the official layout has then, "
            "into shards of FSDP2"
        )
    for field, size, name in rules:
        if getattr(config, field) % size:
            raise ValueError(f"`{field}={getattr(config, field)}`: must be divisible by {name} ({size})")
