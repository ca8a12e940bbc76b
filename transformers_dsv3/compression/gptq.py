"""Rounding a weight matrix to few bits so that its layer's outputs on given inputs change least.

GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after another, and what each loses is made up for by
those that are still to come. With inputs x and the Hessian H, the sum of their x xᵀ, the loss of a row with error e is
e H eᵀ. All that is needed of H is the upper Cholesky factor U of its inverse, H⁻¹ = UᵀU: column i that loses d changes
the later columns j by -d U[i, j] / U[i, i], and adds (d / U[i, i])² to the loss.

Weights are whole numbers times the scale of their group of 32 along the input, -2^(b-1) to 2^(b-1) - 1 at b bits, at 8
bits -127 to 127, as GGUF's Q4_0 and Q8_0 have them and the kernels take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.cpu.operators import GROUP


# Share of the mean of H's diagonal that is added to it: inputs that the text never had would be free otherwise
DAMPING = 0.01
# Where the Hessian has no factor even so, more
_DAMPINGS = (DAMPING, 10 * DAMPING, 1.0)
# Hessians are factorised in fp64 up to this width; those of wider inputs in fp32, which takes half of the memory
WIDEST_IN_FP64 = 4096
# Columns whose errors reach the rest of the matrix in one product
BLOCK = 128
# Scales that are tried, over that which gives the largest of a group the end of the range: smaller ones clip it, which
# pays the more the fewer bits there are
_CLIPS = {2: torch.linspace(0.3, 1.0, 15).tolist()}
_USUAL_CLIPS = torch.linspace(0.6, 1.0, 9).tolist()
# Elements of a matrix that are rounded at once
_CHUNK = 1 << 22


class Rounded(NamedTuple):
    """A matrix of few bits: `whole` int8 `(N, K)`, `scale` fp32 `(N, K / 32)`, values that bf16 and fp16 both hold."""

    whole: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """What it stands for, fp32 `(N, K)`."""
        return (self.whole.unflatten(-1, (-1, GROUP)) * self.scale.unsqueeze(-1)).flatten(-2)


def limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest whole number."""
    return (-127, 127) if bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    # fp16 holds all of bf16 from 2^-14 to 65,280, and of what is smaller multiples of 2^-24, which bf16 holds too
    return scale.bfloat16().half().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def group_scales(columns: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale of each group that rounding to nearest loses least with, in squares.

    Args:
        columns: fp32 `(32, M)`, a group each.

    Returns:
        fp32 `(M,)`. Of either sign: the range reaches further below zero, and the largest of a group may take it.

    Raises:
        ValueError: weights that are not finite, or so large that fp16 does not hold their scale.
    """
    lowest, highest = limits(bits)
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    full = _storable(largest / lowest)
    if not bool(full.isfinite().all()):
        raise ValueError(f"the largest weight is {columns.abs().max().item():g}, which {bits} bits do not hold")
    if bits == 8:
        return full.abs()
    best, least = full, torch.full_like(full, torch.inf)
    # Of the other sign the largest takes the shorter end of the range
    for share in (1.0, lowest / highest):
        for clip in _CLIPS.get(bits, _USUAL_CLIPS):
            scale = _storable(full * (share * clip))
            rounded = (columns * _inverse(scale)).round_().clamp_(lowest, highest).mul_(scale).sub_(columns)
            loss = rounded.square_().sum(dim=0)
            best = torch.where(loss < least, scale, best)
            least = torch.minimum(loss, least)
    return best


def round_to_nearest(weight: torch.Tensor, bits: int) -> Rounded:
    """Each weight to the nearest multiple of its group's scale, which is chosen as in `group_scales`.

    Args:
        weight: `(N, K)`, any floating dtype, K a multiple of 32.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: as `group_scales` does.
    """
    lowest, highest = limits(bits)
    whole = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], weight.shape[1] // GROUP)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        columns = weight[part].float().reshape(-1, GROUP).T.contiguous()
        found = group_scales(columns, bits)
        rounded = (columns * _inverse(found)).round_().clamp_(lowest, highest)
        whole[part] = rounded.T.reshape(-1, weight.shape[1])
        scale[part] = found.view(-1, scale.shape[1])
    return Rounded(whole, scale)


class InverseFactor(NamedTuple):
    """What GPTQ has to know of a matrix's inputs.

    Attributes:
        order: int64 `(K,)`, columns in the order in which they are rounded: groups of 32 together, and those first
            whose inputs are largest, as long as there are others left to make up for what they lose.
        upper: U, upper triangular fp32 `(K, K)`, with UᵀU the inverse of the damped Hessian in this order.
    """

    order: torch.Tensor
    factor: torch.Tensor


def inverse_factor(hessian: torch.Tensor) -> InverseFactor | None:
    """Factorises a Hessian; None where that is impossible: it is zero, or not finite.

    One factorisation suffices: with the order of the inputs turned round, H is V Vᵀ with V upper, and U is V⁻¹.

    Args:
        hessian: `(K, K)`, symmetric, K a multiple of 32. Left as it is.
    """
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    if not bool(mean.isfinite()) or mean <= 0:
        return None
    groups = diagonal.view(-1, GROUP).sum(dim=1).argsort(descending=True, stable=True)
    order = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
    turned_order = order.flip(0)
    turned = hessian[turned_order[:, None], turned_order]
    if len(order) <= WIDEST_IN_FP64:
        turned = turned.double()
    for damping in _DAMPINGS:
        turned.diagonal().copy_(diagonal[turned_order] + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            break
    else:
        return None
    turned.zero_().diagonal().fill_(1)
    inverse = torch.linalg.solve_triangular(lower, turned, upper=False, out=turned)
    del lower
    return InverseFactor(order, inverse.float().flip(0, 1))


def gptq(weight: torch.Tensor, factor: InverseFactor, bits: int) -> Rounded:
    """Rounds a matrix column by column, and makes up in later columns for what the earlier ones lose.

    The scale of a group is chosen when its turn comes, from the weights as they are then.

    Args:
        weight: `(N, K)`, any floating dtype, K a multiple of 32.
        factor: what `inverse_factor` gives.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: as `group_scales` does.
    """
    lowest, highest = limits(bits)
    order, upper = factor
    rows, width = weight.shape
    left = weight.T[order].float()  # a column is contiguous here
    whole = torch.empty(width, rows, dtype=torch.int8)
    scale = torch.empty(width // GROUP, rows)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        losses = torch.empty(end - start, rows)
        for i in range(start, end):
            if i % GROUP == 0:
                group = group_scales(left[i : i + GROUP], bits)
                inverse = _inverse(group)
                scale[order[i] // GROUP] = group
            rounded = (left[i] * inverse).round_().clamp_(lowest, highest)
            whole[order[i]] = rounded.to(torch.int8)
            loss = losses[i - start]
            torch.sub(left[i], rounded.mul_(group), out=loss).div_(upper[i, i])
            left[i + 1 : end].addr_(upper[i, i + 1 : end], loss, alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, losses, alpha=-1)
    return Rounded(whole.T.contiguous(), scale.T.contiguous())
