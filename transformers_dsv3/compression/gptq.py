"""Rounding a weight matrix to few bits so that its layer's outputs on given inputs change least.

GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after another, and what each loses is made up for by
those that are still to come. With inputs x and the Hessian H, the sum of their x xᵀ, the loss of a row with error e is
e H eᵀ. Eliminating the columns that are rounded already leaves the inverse's upper Cholesky factor U, H⁻¹ = UᵀU: column
i that loses d changes the later columns j by -d U[i, j] / U[i, i], and adds (d / U[i, i])² to the loss.

Weights are whole numbers times the scale of their group of 32 along the input, -2^(b-1) to 2^(b-1) - 1 at b bits, at 8
bits -127 to 127, as GGUF's Q4_0 and Q8_0 have them and the kernels take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.cpu.operators import GROUP


# Share of the mean of H's diagonal that is added to it: inputs that the text never had would be free otherwise
DAMPING = 0.01
# Columns whose errors reach the rest of the matrix in one product
BLOCK = 128
# The largest of a group over the end of the range, times these: more than 1 clips the largest for the sake of the others
_CLIPS = {3: 24, 4: 16}
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
    for clip in _clips(bits):
        scale = _storable(full * clip)
        rounded = (columns * _inverse(scale)).round_().clamp_(lowest, highest).mul_(scale).sub_(columns)
        loss = rounded.square_().sum(dim=0)
        best = torch.where(loss < least, scale, best)
        least = torch.minimum(loss, least)
    return best


def _clips(bits: int) -> list[float]:
    lowest, highest = limits(bits)
    shares = torch.linspace(0.6, 1.0, 17).tolist()
    # Of the other sign the largest takes the shorter end of the range
    return [*shares, *(share * lowest / highest for share in shares)]


def round_to_nearest(weight: torch.Tensor, bits: int) -> Rounded:
    """Each weight to the nearest multiple of its group's scale, which is chosen as in `group_scales`.

    Args:
        weight: `(N, K)`, any floating dtype, K a multiple of 32.
        bits: 3, 4 or 8.

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


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """U, upper triangular fp32 `(K, K)`, with UᵀU the inverse of the damped Hessian; None where there is none.

    It comes from one factorisation: with the order of the inputs turned round, H is V Vᵀ with V upper, and U is V⁻¹.

    Args:
        hessian: `(K, K)`, symmetric. Left as it is.
    """
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    if not bool(mean.isfinite()) or mean <= 0:
        return None
    turned = hessian.flip(0, 1).double()
    for damping in (DAMPING, 10 * DAMPING, 1.0):
        turned.diagonal().copy_(diagonal.flip(0) + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            break
    else:
        return None
    turned.zero_().diagonal().fill_(1)
    inverse = torch.linalg.solve_triangular(factor, turned, upper=False, out=turned)
    return inverse.flip(0, 1).float()


def gptq(weight: torch.Tensor, factor: torch.Tensor, bits: int) -> Rounded:
    """Rounds a matrix column by column, and makes up in later columns for what the earlier ones lose.

    The scale of a group is chosen when its turn comes, from the weights as they are then.

    Args:
        weight: `(N, K)`, any floating dtype, K a multiple of 32.
        factor: fp32 `(K, K)`, what `inverse_factor` gives.
        bits: 3, 4 or 8.

    Raises:
        ValueError: as `group_scales` does.
    """
    lowest, highest = limits(bits)
    rows, width = weight.shape
    # A column is contiguous here
    left = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    whole = torch.empty(width, rows, dtype=torch.int8)
    scale = torch.empty(width // GROUP, rows)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        losses = torch.empty(end - start, rows)
        for i in range(start, end):
            if i % GROUP == 0:
                group = group_scales(left[i : i + GROUP], bits)
                inverse = _inverse(group)
                scale[i // GROUP] = group
            rounded = (left[i] * inverse).round_().clamp_(lowest, highest)
            whole[i] = rounded
            loss = losses[i - start]
            torch.sub(left[i], rounded.mul_(group), out=loss).div_(factor[i, i])
            left[i + 1 : end].addr_(factor[i, i + 1 : end], loss, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, losses, alpha=-1)
    return Rounded(whole.T.contiguous(), scale.T.contiguous())
