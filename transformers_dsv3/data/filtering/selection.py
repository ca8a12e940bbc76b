"""Which documents are kept: the best by their scores, so many tokens of each domain and language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np


# Scores are told apart up to so many parts of a bit: their histograms are small, whatever the number of documents
LEVELS_A_BIT = 4096
N_LEVELS = 32 * LEVELS_A_BIT  # what writing that the seed has not needs is up to 20 bits a byte


def levels(bits_per_byte: np.ndarray) -> np.ndarray:
    """Scores as whole numbers, int64: lower is better, and what has none is last."""
    scores = np.where(np.isnan(bits_per_byte), np.inf, bits_per_byte)
    return np.clip(np.rint(scores * LEVELS_A_BIT), 0, N_LEVELS - 1).astype(np.int64)


@dataclass
class Histogram:
    """Tokens of candidates by group and score. Those of several shards add up."""

    tokens: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, group: str, levels: np.ndarray, tokens: np.ndarray) -> None:
        counts = np.bincount(levels, weights=tokens, minlength=N_LEVELS).astype(np.int64)
        self.tokens[group] = self.tokens.get(group, 0) + counts

    def totals(self) -> dict[str, int]:
        return {group: int(counts.sum()) for group, counts in sorted(self.tokens.items())}


def quotas(available: Mapping[str, int], budget: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Tokens of each group, which sum to the budget as far as there are as many.

    Each group gets its share; what it has not is shared out among the others in the same proportions.
    """
    left, given = budget, dict.fromkeys(available, 0)
    open_groups = {group for group, tokens in available.items() if tokens and shares.get(group, 0) > 0}
    while open_groups and left > 0:
        whole = sum(shares[group] for group in open_groups)
        full = {group for group in open_groups if given[group] + left * shares[group] / whole >= available[group]}
        if not full:
            for group in open_groups:
                given[group] += int(left * shares[group] / whole)
            break
        for group in full:
            left -= available[group] - given[group]
            given[group] = available[group]
        open_groups -= full
    return given


def thresholds(histogram: Histogram, wanted: Mapping[str, int]) -> dict[str, int]:
    """The last score that is kept of each group, -1 for none: the one that comes nearest to the wanted tokens."""
    last = {}
    for group, counts in histogram.tokens.items():
        kept = np.cumsum(counts)
        target = wanted.get(group, 0)
        place = int(np.searchsorted(kept, target))  # the first level with which there is enough
        before = int(kept[place - 1]) if place else 0
        if place >= N_LEVELS:
            place = N_LEVELS - 1
        elif target - before <= int(kept[place]) - target and int(kept[place]) != target:
            place -= 1
        last[group] = place if target else -1
    return last


def best_of_clusters(clusters: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The member with the lowest score of each cluster, the first of several.

    Args:
        clusters: of each shard in their order, cluster numbers, scores and places of its members.

    Returns:
        int64 `(clusters, 2)`: shard and place.
    """
    best: dict[int, tuple[float, int, int]] = {}
    for shard, (numbers, scores, places) in enumerate(clusters):
        for number, score, place in zip(numbers.tolist(), scores.tolist(), places.tolist(), strict=True):
            candidate = (score, shard, place)
            if number not in best or candidate < best[number]:
                best[number] = candidate
    return np.array([best[number][1:] for number in range(len(best))], dtype=np.int64).reshape(-1, 2)
