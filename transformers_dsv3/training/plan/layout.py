"""A pipeline of unequal pieces: its cut by cost, and the step simulated over torch's own tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from ..pipeline.kinds import rank_of_stage
from .cut import cut, improve
from .schedules import SCHEDULES, Program, Timeline, action_tables, check_schedule, stage_times


@dataclass(frozen=True)
class PieceTimes:
    """Seconds of each piece, in order, for one microbatch: forward, gradient of inputs, gradient of weights."""

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def whole(self) -> list[float]:
        """All three together, by piece."""
        return [sum(three) for three in zip(self.forward, self.inputs, self.weights)]

    def by_stage(self, bounds: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
        """The three by stage of a cut."""
        ranges = list(zip(bounds, bounds[1:]))
        forward, inputs, weights = (
            [sum(times[start:end]) for start, end in ranges] for times in (self.forward, self.inputs, self.weights)
        )
        return forward, inputs, weights


@cache
def _program(schedule: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> Program:
    return Program(action_tables(schedule, ranks, microbatches, stages_per_rank))


@dataclass(frozen=True)
class Pipeline:
    """A schedule on so many ranks, of so many microbatches a step.

    Args:
        given_stages: a rank, of Interleaved1F1B; None for 2.
        delay: seconds in which a microbatch's tensor reaches the next rank.

    Raises:
        OptionError: as `check_schedule` does.
    """

    schedule: str
    ranks: int
    microbatches: int
    given_stages: int | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.ranks, self.microbatches, self.given_stages)

    @property
    def stages_per_rank(self) -> int:
        return check_schedule(self.schedule, self.ranks, self.microbatches, self.given_stages)

    def run(self, times: PieceTimes, bounds: Sequence[int]) -> Timeline:
        """One step of a cut."""
        return self._run(times, bounds, self.microbatches)

    def first(self, times: PieceTimes, bounds: Sequence[int]) -> Timeline:
        """The step with as few microbatches as show how the pipeline fills and empties."""
        return self._run(times, bounds, min(self.microbatches, 2 * self.ranks))

    def seconds(self, times: PieceTimes, bounds: Sequence[int], rounds: int = 8) -> float:
        """Of the step: so many microbatches a rank are simulated, and the busiest rank's work for all others added.

        That is up to a hundredth too much, where the busiest rank makes up for having waited.
        """
        few = min(self.microbatches, rounds * self.ranks)
        more = (self.microbatches - few) * max(self.loads(times.whole, bounds))
        return self._run(times, bounds, few).seconds + more

    def _run(self, times: PieceTimes, bounds: Sequence[int], microbatches: int) -> Timeline:
        program = _program(self.schedule, self.ranks, microbatches, self.given_stages)
        return program.run(stage_times(*times.by_stage(bounds)), self.delay)

    def loads(self, costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
        """What each rank has of some cost of the pieces."""
        loads = [0.0] * self.ranks
        for stage, (start, end) in enumerate(zip(bounds, bounds[1:])):
            loads[rank_of_stage(self.schedule, self.ranks, stage)] += sum(costs[start:end])
        return loads

    def cut(self, times: PieceTimes, tries: int = 0) -> list[int]:
        """Where stages begin: evened out by costs, then moved as long as the step gets shorter.

        Args:
            tries: simulated steps at the most.

        Raises:
            OptionError: more stages than pieces.
        """
        costs, per_rank = times.whole, self.stages_per_rank
        starts = [cut(costs, self.schedule, self.ranks, per_rank)]
        if SCHEDULES[self.schedule].is_v:
            starts.append(cut(costs, "1F1B", self.ranks, per_rank))
        if tries:
            span = partial(self.seconds, times, rounds=2)
            starts = [improve(bounds, span, tries // len(starts)) for bounds in starts]
        return min(starts, key=partial(self.seconds, times))
