"""Interleaved turns of several contenders, and what to make of their times.

Contenders take turns within one run, so that what changes on the machine meets all of them: A B, B A, A B, …
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar


Contender = TypeVar("Contender")


@dataclass(frozen=True)
class Turn:
    """One timed turn of a contender.

    Args:
        seconds: of one unit of work (a decode step, a prefill, a training step).
        units: how many were timed.
        notes: anything else that was counted.
    """

    seconds: float
    units: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


def order_of(round_number: int, count: int) -> list[int]:
    """Positions of `count` contenders in a round: forward in even rounds, backward in odd ones."""
    order = list(range(count))
    return order if round_number % 2 == 0 else order[::-1]


def interleave(
    names: Sequence[str],
    turn: Callable[[str], Turn],
    rounds: int,
    before_round: Callable[[], None],
    after_round: Callable[[dict[str, list[Turn]], dict[str, str]], None],
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """Lets every contender take one turn a round.

    Args:
        turn: runs one turn of the contender named. One that raises is out from then on, with what it had measured left
            out too, since ratios compare whole rounds.
        before_round: called before each round, to measure the machine.
        after_round: called after each round with what there is so far.

    Returns:
        The turns of each contender, and the reason of each that failed.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for round_number in range(rounds):
        before_round()
        for place in order_of(round_number, len(names)):
            name = names[place]
            if name in failed:
                continue
            try:
                turns[name].append(turn(name))
            except Exception as error:  # compilers have errors of their own, and one contender is not the run
                failed[name] = reason_of(error)
                del turns[name]
        after_round(turns, failed)
    return turns, failed


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    speaks = isinstance(error, (RuntimeError, ValueError, OSError, MemoryError))
    return lines[0] if speaks else f"{type(error).__name__}: {lines[0]}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of a list that is not empty."""
    ordered = sorted(values)
    lower, _, upper = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": statistics.median(ordered),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": ordered[0],
        "max": ordered[-1],
    }


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, Any]:
    """How many times longer the first takes than the second: the spread of the ratios of single rounds.

    Round by round, what slowed the machine for a while slowed both, and falls out.
    """
    per_round = [a / b for a, b in zip(slower, faster)]
    return {"per_round": per_round, **spread(per_round)}
