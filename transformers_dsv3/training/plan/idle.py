"""Idle time of pipelines by schedule, size and cut, on a model's own unequal parts and on equal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ...models.dsv3.configuration_dsv3 import DeepseekV3Config
from .cut import cut, whole_layers
from .layout import PieceTimes, Pipeline
from .schedules import Timeline
from .splits import ATTENTION_BACKWARD
from .units import Unit, units_of


# Ranks, microbatches, and the share that ZBV may wait at the most
SIZES = ((4, 32, 0.03), (8, 64, 0.06), (16, 120, 0.10))
# The article's two figures, and where equal stages have them
ARTICLE = (("1F1B", 16, 110, 0.12), ("ZBV", 16, 81, 0.03))


@dataclass(frozen=True)
class IdleRow:
    """Idle shares of one size.

    Attributes:
        whole: 1F1B with equally many layers a rank; None for fewer layers than ranks.
        by_cost: 1F1B, the busiest rank's work least.
        zbv_layers: ZBV, cut by cost between layers.
        zbv, dualpipev: cut between the halves of layers and before heads too, moved until no step gets shorter.
        floor: the least that ZBV could have were all stages equal.
        target: the most that ZBV is to have.
    """

    ranks: int
    microbatches: int
    whole: float | None
    by_cost: float
    zbv_layers: float | None
    zbv: float
    dualpipev: float
    floor: float
    target: float


def operation_times(units: Sequence[Unit]) -> PieceTimes:
    """Floating-point operations of a token in the place of seconds: what stages' times are in proportion to."""
    return PieceTimes(
        tuple(2.0 * unit.products + unit.context for unit in units),
        tuple(2.0 * unit.products + ATTENTION_BACKWARD * unit.context for unit in units),
        tuple(2.0 * unit.products for unit in units),
    )


def idle_table(config: DeepseekV3Config, sequence: int = 4096, tries: int = 200) -> list[IdleRow]:
    """Simulated idle shares of a model's pipeline.

    Args:
        tries: simulated steps for the cuts of each size and schedule.

    Raises:
        OptionError: for a model with fewer pieces than 32 stages take.
    """
    units = units_of(config, sequence)
    times = operation_times(units)
    return [_row(config, units, times, *size, tries) for size in SIZES]


def _row(
    config: DeepseekV3Config,
    units: Sequence[Unit],
    times: PieceTimes,
    ranks: int,
    microbatches: int,
    target: float,
    tries: int,
) -> IdleRow:
    plain, zbv, dual = (Pipeline(name, ranks, microbatches) for name in ("1F1B", "ZBV", "DualPipeV"))
    layers = config.num_hidden_layers
    whole = None
    if layers >= ranks:
        whole = plain.run(times, whole_layers([unit.name for unit in units], layers, ranks)).idle
    between = [0, *(place for place, unit in enumerate(units) if unit.part == "attention"), len(units)]
    costs = [sum(times.whole[start:end]) for start, end in zip(between, between[1:])]
    zbv_layers = None
    if len(costs) >= 2 * ranks:
        zbv_layers = min(
            zbv.run(times, [between[bound] for bound in cut(costs, paired, ranks, 2)]).idle
            for paired in ("ZBV", "1F1B")
        )
    return IdleRow(
        ranks=ranks,
        microbatches=microbatches,
        whole=whole,
        by_cost=plain.run(times, plain.cut(times, tries)).idle,
        zbv_layers=zbv_layers,
        zbv=zbv.run(times, zbv.cut(times, tries)).idle,
        dualpipev=dual.run(times, dual.cut(times, tries)).idle,
        floor=(ranks - 1) / (6 * microbatches + ranks - 1),
        target=target,
    )


def equal_stages(schedule: str, ranks: int, microbatches: int) -> float:
    """Idle share of stages that all take the same time."""
    pipeline = Pipeline(schedule, ranks, microbatches)
    stages = ranks * pipeline.stages_per_rank
    return pipeline.run(PieceTimes(*((1.0,) * stages,) * 3), range(stages + 1)).idle


def stage_names(units: Sequence[Unit], bounds: Sequence[int]) -> list[str]:
    """What each stage has, from its first piece to its last."""
    names = []
    for start, end in zip(bounds, bounds[1:]):
        pieces = [name for name, _ in groupby(unit.name for unit in units[start:end])]
        names.append(pieces[0] if len(pieces) == 1 else f"{pieces[0]} to {pieces[-1]}")
    return names


def idle_timelines(config: DeepseekV3Config, sequence: int = 4096, tries: int = 200) -> list[tuple[str, Timeline]]:
    """1F1B and ZBV of the smallest size, cut as in the table, for a picture. Times are in operations of a token."""
    times = operation_times(units_of(config, sequence))
    ranks, microbatches, _ = SIZES[0]
    drawn = []
    for schedule in ("1F1B", "ZBV"):
        pipeline = Pipeline(schedule, ranks, microbatches)
        title = f"{schedule}, {ranks} ranks, {microbatches} microbatches"
        drawn.append((title, pipeline.run(times, pipeline.cut(times, tries))))
    return drawn
