"""How evenly a mixture of experts is used, from counts of the tokens that each expert was chosen for.

MaxVio is of arXiv 2408.15664, section 4.1; utilisation is 1 / (1 + MaxVio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingStatistics:
    """Figures of each layer, fp64 tensors `(L,)`. A layer through which no token went has NaN everywhere.

    Attributes:
        utilisation: mean over maximum load, 1 when all experts are used alike, 1 / E when one gets every token.
        max_violation: MaxVio, (maximum - mean) / mean load.
        load_entropy: entropy of the shares of the load, over that of equal shares: from 0 to 1.
        dead_experts: experts that no token chose.
        above_half_fair: share of the experts with more than half of the mean load.
    """

    utilisation: torch.Tensor
    max_violation: torch.Tensor
    load_entropy: torch.Tensor
    dead_experts: torch.Tensor
    above_half_fair: torch.Tensor

    def mean(self) -> dict[str, float]:
        """Every figure averaged over the layers that saw tokens; `dead_experts` summed over them."""
        seen = ~self.utilisation.isnan()
        figures = {name: values[seen] for name, values in vars(self).items()}
        return {
            name: float(values.sum() if name == "dead_experts" else values.mean()) for name, values in figures.items()
        }


def routing_statistics(tokens_per_expert: torch.Tensor) -> RoutingStatistics:
    """Statistics of the loads of L layers of E experts.

    Args:
        tokens_per_expert: `(L, E)`, how many tokens chose each expert, of any dtype.
    """
    if tokens_per_expert.dim() != 2 or tokens_per_expert.shape[1] < 1:
        raise ValueError(f"tokens_per_expert must be (layers, experts), not {tuple(tokens_per_expert.shape)}")
    load_LE = tokens_per_expert.to(torch.float64)
    seen_L1 = load_LE.sum(dim=1, keepdim=True) > 0
    load_LE = load_LE.masked_fill(~seen_L1, float("nan"))
    unknown_L = (~seen_L1[:, 0]).to(torch.float64).masked_fill(~seen_L1[:, 0], float("nan"))
    mean_L, max_L = load_LE.mean(dim=1), load_LE.amax(dim=1)
    shares_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    number = load_LE.shape[1]
    entropy_L = torch.special.entr(shares_LE).sum(dim=1)
    return RoutingStatistics(
        utilisation=mean_L / max_L,
        max_violation=(max_L - mean_L) / mean_L,
        load_entropy=entropy_L / math.log(number) if number > 1 else torch.ones_like(mean_L) + unknown_L,
        dead_experts=(load_LE == 0).sum(dim=1) + unknown_L,
        above_half_fair=(load_LE > mean_L[:, None] / 2).double().mean(dim=1) + unknown_L,
    )
