"""What an adapter adds to quantised weights, rounded to their bits, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...kernels.quantized_groups import dequantize
from ..gptq import round_to_nearest
from ..quantized_weights import held_in


@dataclass(frozen=True)
class MergeCost:
    """What was lost where adapters were merged into quantised weights and these were rounded anew.

    Attributes:
        largest: the largest difference of a weight from the sum of weight and adapter.
        squared, weights: sum of squares of all differences, and how many weights they are of.
        squared_change: sum of squares of what the adapter adds.
    """

    largest: float = 0.0
    squared: float = 0.0
    squared_change: float = 0.0
    weights: int = 0

    def __add__(self, other: MergeCost) -> MergeCost:
        """That of the weights of both."""
        return MergeCost(
            max(self.largest, other.largest),
            self.squared + other.squared,
            self.squared_change + other.squared_change,
            self.weights + other.weights,
        )

    @property
    def root_mean_square(self) -> float:
        """Of the differences."""
        return math.sqrt(self.squared / max(1, self.weights))

    @property
    def share_of_change(self) -> float:
        """The differences over what the adapter adds, both as root mean squares; from 1 on it is drowned."""
        return math.sqrt(self.squared / self.squared_change) if self.squared_change else 0.0

    def __str__(self) -> str:
        return (
            f"that lost {self.root_mean_square:.2g} a weight (root mean square; at most {self.largest:.2g}), "
            f"{self.share_of_change:.0%} of what the adapters add"
        )


@torch.no_grad()
def merged_matrix(values: torch.Tensor, scale: torch.Tensor, change: torch.Tensor, stored_bits: int) -> MergeCost:
    """Adds to a quantised matrix and rounds the sum to nearest, in place, each group's scale chosen anew.

    Args:
        values, scale: of the matrix `(N, K)`, as `quantize_groups` returns them; written.
        change: `(N, K)`, fp32.
        stored_bits: that the matrix is to have in a checkpoint, no more than it is held in.

    Returns:
        What is lost.

    Raises:
        ValueError: for sums that are not finite or too large.
    """
    before = dequantize(values, scale, torch.float32)
    change = change.to(before.device)
    wanted = before + change
    rounded = round_to_nearest(wanted.cpu(), stored_bits)
    values.copy_(held_in(rounded.whole, 4 if values.dtype == torch.uint8 else 8))
    scale.copy_(rounded.scale)
    lost = dequantize(values, scale, torch.float32) - wanted
    squares = [float(x.double().square().sum()) for x in (lost, change)]
    return MergeCost(lost.abs().max().item(), squares[0], squares[1], lost.numel())
