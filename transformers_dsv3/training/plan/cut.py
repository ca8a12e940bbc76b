"""Where a pipeline is cut: into stages such that the busiest rank has as little to do as may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from ...option_error import OptionError
from ..pipeline.kinds import SCHEDULES


def cut(costs: Sequence[float], schedule: str, ranks: int, stages_per_rank: int) -> list[int]:
    """Where each stage begins, and behind the last where it ends.

    In schedules in the form of a V stages are paired on ranks from both ends inward, and the pairs are evened out; in
    others the stages themselves are.

    Args:
        costs: of the pieces that are not to be cut, in order.

    Raises:
        OptionError: more stages than pieces.
    """
    stages = ranks * stages_per_rank
    if stages > len(costs):
        raise OptionError("--pp", f"{stages} stages ({ranks} ranks of {stages_per_rank}) of {len(costs)} pieces")
    is_v, sums = SCHEDULES[schedule].is_v, [0.0, *accumulate(costs)]
    low, high = max(sums[-1] / ranks, max(costs)) if is_v else sums[-1] / stages, sums[-1]
    fit, number = (_fit_pairs, ranks) if is_v else (_fit_stages, stages)
    best = fit(sums, high, number)
    assert best is not None
    for _ in range(40):
        middle = (low + high) / 2
        found = fit(sums, middle, number)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def whole_layers(pieces: Sequence[str], layers: int, stages: int) -> list[int]:
    """The plain cut that knows no costs: equally many layers a stage, what is before and behind them at the ends.

    Args:
        pieces: names, of `units_of`.
    """
    starts = [pieces.index(f"layer {layer} attention") for layer in range(layers)]
    return [0, *(starts[layers * stage // stages] for stage in range(1, stages)), len(pieces)]


def _fit_stages(sums: Sequence[float], most: float, stages: int) -> list[int] | None:
    """Stages of at most so much each, or None: each as large as it may be, so long as one piece is left for all."""
    pieces, bounds = len(sums) - 1, [0]
    for left in range(stages - 1, -1, -1):
        end = start = bounds[-1]
        while end < pieces - left and sums[end + 1] - sums[start] <= most:
            end += 1
        if end == start:
            return None
        bounds.append(end)
    return bounds if bounds[-1] == pieces else None


def _fit_pairs(sums: Sequence[float], most: float, ranks: int) -> list[int] | None:
    """Stages of a V whose pairs have at most so much, or None where none was found, from both ends inward.

    Of ways that have come as far at one end only the one is followed that has come furthest at the other: with few
    pieces a stage, another might have left better pairs.
    """
    pieces = len(sums) - 1
    frontier: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = [(0, pieces, (0,), (pieces,))]
    for left in range(ranks - 1, -1, -1):
        furthest: dict[int, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {}
        for first, last, fronts, backs in frontier:
            room = last - first - 2 * left  # every later rank needs two pieces
            end = first + 1
            while end - first < room and sums[end] - sums[first] < most:
                start = last - 1
                used = sums[end] - sums[first]
                if used + sums[last] - sums[start] > most:
                    break
                while start - 1 >= end + 2 * left and used + sums[last] - sums[start - 1] <= most:
                    start -= 1
                if end not in furthest or start < furthest[end][1]:
                    furthest[end] = (end, start, (*fronts, end), (*backs, start))
                end += 1
        frontier, lowest = [], pieces + 1
        for end in sorted(furthest, reverse=True):
            if furthest[end][1] < lowest:
                lowest = furthest[end][1]
                frontier.append(furthest[end])
        if not frontier:
            return None
    for end, start, fronts, backs in frontier:
        if end == start:
            return [*fronts, *reversed(backs[:-1])]
    return None


def improve(bounds: Sequence[int], span: Callable[[list[int]], float], tries: int) -> list[int]:
    """A cut moved piece by piece, one bound at a time or two of a V's opposite ones, as long as that shortens a step.

    Args:
        span: seconds of a step with a cut.
        tries: how often `span` is asked at the most.
    """
    best, shortest = list(bounds), span(list(bounds))
    stages = len(best) - 1
    opposite = [(k, stages - k) for k in range(1, (stages + 1) // 2)]
    moves: list[tuple[tuple[int, int], ...]] = [((k, step),) for k in range(1, stages) for step in (1, -1)]
    moves += [((k, one), (m, other)) for k, m in opposite for one in (1, -1) for other in (1, -1)]
    since = place = 0
    while since < len(moves) and tries > 0:
        moved = list(best)
        for bound, step in moves[place % len(moves)]:
            moved[bound] += step
        place, since = place + 1, since + 1
        if any(low >= high for low, high in zip(moved, moved[1:])):
            continue
        tries -= 1
        if (found := span(moved)) < shortest * (1 - 1e-9):
            best, shortest, since = moved, found, 0
    return best
