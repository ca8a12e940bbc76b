"""How far counts of draws are from a distribution."""

import torch


def chi_squared_deviations(counts, expected):
    """χ² of draws over cells of at least 5 expected ones, in standard deviations from its mean.

    Args:
        counts: fp64 `(V,)`, how often each was drawn. expected: fp64 `(V,)`, probabilities.
    """
    draws = float(counts.sum())
    order = expected.argsort(descending=True)
    cell = ((draws * expected[order]).cumsum(0) / 5).floor().long()
    wanted = torch.zeros(int(cell[-1]) + 1, dtype=torch.float64).scatter_add_(0, cell, draws * expected[order])
    found = torch.zeros_like(wanted).scatter_add_(0, cell, counts[order])
    found, wanted = found[wanted >= 5], wanted[wanted >= 5]
    freedom = max(len(wanted) - 1, 1)
    return float((((found - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5)
