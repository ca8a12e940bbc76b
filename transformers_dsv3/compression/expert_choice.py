"""How many routed experts are left when a share of them is pruned, and which."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from ..option_error import OptionError


# By what experts are chosen
CRITERIA = ("reap", "frequency", "random")


def kept_experts(config: DeepseekV3Config, share: float) -> int:
    """Routed experts of a layer that are left when a share of them is removed, as many of each group.

    Raises:
        OptionError: the share is none, it is not a whole number of experts of each group, or it leaves fewer than the
            router chooses or, of a group, fewer than two.
    """
    total, groups = config.n_routed_experts, config.n_group
    if not 0 <= share < 1:
        raise OptionError("--prune", f"is a share of the experts, from 0 to below 1, not {share}")
    of_group = total // groups
    removed = share * of_group
    if abs(removed - round(removed)) > 1e-6:
        nearest = round(removed) / of_group
        raise OptionError(
            "--prune",
            f"{share:g} of {total} experts in {groups} group{'s' * (groups > 1)} is not a whole number of each: "
            f"{nearest:g} is the nearest share that is",
        )
    left = of_group - round(removed)
    least = max(-(-config.num_experts_per_tok // config.topk_group), 2 if groups > 1 else 1)
    if left < least:
        raise OptionError(
            "--prune",
            f"{share:g} leaves {left * groups} of {total} experts; {least * groups} are the least of which "
            f"`num_experts_per_tok={config.num_experts_per_tok}` can be chosen with `n_group={groups}` and "
            f"`topk_group={config.topk_group}`: at most {1 - least / of_group:g}",
        )
    return left * groups


def check_criterion(by: str) -> None:
    """Raises `OptionError` for what is none."""
    if by not in CRITERIA:
        raise OptionError("--prune-by", f"is one of {', '.join(CRITERIA)}, not {by!r}")


@dataclass(frozen=True)
class ExpertImportance:
    """How much each routed expert does to a text.

    Attributes:
        layers: numbers of the L mixture-of-experts layers in the checkpoint, those of MTP layers last.
        reap: router-weighted activation (arXiv 2510.13999), fp64 `(L, E)`: over the tokens that chose an expert, the
            mean of its mixing weight times the norm of its output. 0 where none did.
        frequency: share of the tokens that chose an expert, fp64 `(L, E)`.
        tokens: how many went through the model.
    """

    layers: tuple[int, ...]
    reap: torch.Tensor
    frequency: torch.Tensor
    tokens: int


def choose_experts(
    config: DeepseekV3Config,
    share: float,
    importance: ExpertImportance | None = None,
    by: str = "reap",
    seed: int = 0,
) -> dict[int, tuple[int, ...]]:
    """The experts that are left of each mixture-of-experts layer, MTP layers too, in the order of their numbers.

    Args:
        share: of the experts to remove, the same in every layer and group.
        importance: on a text, from `expert_importance`; not needed to choose at random.
        by: "reap", "frequency" or "random": what a criterion has to be better than.
        seed: of what is drawn at random.

    Raises:
        OptionError: as `kept_experts` does, and for another criterion.
        ValueError: for importances that are missing, of other layers or of another number of experts.
    """
    kept = kept_experts(config, share)
    check_criterion(by)
    mtp = range(config.num_hidden_layers, config.num_hidden_layers + (config.num_nextn_predict_layers or 0))
    layers = [*config.moe_layers, *(layer for layer in mtp if config.is_moe(layer))]
    shape = (len(layers), config.n_routed_experts)
    if not layers:
        raise OptionError("--prune", "the model has no routed experts")
    if by == "random":
        scores_LE = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif importance is None:
        raise ValueError(f"`importance` is needed to choose experts by {by!r}.")
    else:
        scores_LE = getattr(importance, by)
        if importance.layers != tuple(layers) or scores_LE.shape != shape:
            raise ValueError(
                f"`importance` is of layers {list(importance.layers)} with {scores_LE.shape[1]} experts, the model's "
                f"mixture-of-experts layers are {layers} with {config.n_routed_experts}."
            )
    size = config.n_routed_experts // config.n_group
    order_LGe = scores_LE.unflatten(1, (config.n_group, size)).argsort(dim=-1, descending=True, stable=True)
    first_G1 = torch.arange(config.n_group)[:, None] * size
    chosen_LK = (order_LGe[..., : kept // config.n_group] + first_G1).flatten(1).sort(dim=1)[0]
    return {layer: tuple(experts) for layer, experts in zip(layers, chosen_LK.tolist(), strict=True)}
