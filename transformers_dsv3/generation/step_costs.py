"""How long a step takes, by what is in it: fitted to the steps that were made. No tensors."""

from __future__ import annotations

from collections.abc import Sequence


# How much of what was seen is left after a step: some hundred of the last ones count
_KEPT = 0.99
# Steps before the fit is asked
_FEWEST = 4
# A step that took so many times longer than expected was held up by something else
_HELD_UP = 4.0
# So that all are in the order of one
_SCALES = (1.0, 1e-2, 1e-2, 1e-5)
_COUNT = len(_SCALES)


class StepCosts:
    """Seconds of a step: so much each, a sequence in it, a token, and a pair of a token and one it looks back at.

    Least squares over the latest steps, none of the four below 0.
    """

    def __init__(self) -> None:
        self._products = [[0.0] * _COUNT for _ in range(_COUNT)]
        self._targets = [0.0] * _COUNT
        self._weights = [0.0] * _COUNT
        self.steps = 0

    def seconds(self, sequences: int, tokens: int, pairs: int) -> float:
        """What is expected of a step; 0 as long as nothing is known."""
        return sum(weight * x for weight, x in zip(self._weights, _features(sequences, tokens, pairs)))

    @property
    def is_known(self) -> bool:
        """Whether enough was seen."""
        return self.steps >= _FEWEST

    def saw(self, sequences: int, tokens: int, pairs: int, seconds: float) -> None:
        """Takes a step into account."""
        expected = self.seconds(sequences, tokens, pairs)
        if self.is_known and expected > 0:
            seconds = min(seconds, _HELD_UP * expected)
        features = _features(sequences, tokens, pairs)
        for row, x in enumerate(features):
            self._targets[row] = _KEPT * self._targets[row] + x * seconds
            for column, y in enumerate(features):
                self._products[row][column] = _KEPT * self._products[row][column] + x * y
        self.steps += 1
        self._weights = self._fit(list(range(_COUNT)))

    def tokens_within(self, seconds: float, sequences: int, tokens: int, pairs: int, start: int, most: int) -> int:
        """How many tokens of one more sequence from `start` on, `most` at most, a step may have to take no longer."""
        left = seconds - self.seconds(sequences + 1, tokens, pairs)
        a_token = self._weights[2] * _SCALES[2] + self._weights[3] * _SCALES[3] * (start + most / 2)
        if left <= 0:
            return 0
        return most if a_token * most <= left else int(left / a_token)

    def _fit(self, chosen: list[int]) -> list[float]:
        """Least squares by some of the features, without those that would count below 0."""
        rows = [
            [self._products[i][j] + (1e-9 if i == j else 0.0) for j in chosen] + [self._targets[i]] for i in chosen
        ]
        solution = _solve(rows)
        kept = [i for i, weight in zip(chosen, solution) if weight > 0]
        if len(kept) < len(chosen):
            return self._fit(kept) if kept else [0.0] * _COUNT
        weights = [0.0] * _COUNT
        for i, weight in zip(chosen, solution):
            weights[i] = weight
        return weights


def _features(sequences: int, tokens: int, pairs: int) -> tuple[float, ...]:
    return tuple(scale * x for scale, x in zip(_SCALES, (1, sequences, tokens, pairs)))


def _solve(rows: Sequence[list[float]]) -> list[float]:
    """The solution of a positive definite system, whose right side stands in the last column."""
    count = len(rows)
    for i in range(count):
        pivot = rows[i][i] or 1e-12
        for below in rows[i + 1 :]:
            factor = below[i] / pivot
            for j in range(i, count + 1):
                below[j] -= factor * rows[i][j]
    solution = [0.0] * count
    for i in reversed(range(count)):
        rest = rows[i][count] - sum(rows[i][j] * solution[j] for j in range(i + 1, count))
        solution[i] = rest / (rows[i][i] or 1e-12)
    return solution
