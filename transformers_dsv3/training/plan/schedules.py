"""Pipeline schedules: torch's own action tables, and how long they take when every action has its own time.

A rank runs its actions in the table's order, each as soon as what it needs is there: a forward after that of the stage
before, a backward after that of the stage behind. Idle time, papers' bubble, is what is left of ranks times span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from ...option_error import OptionError
from ..pipeline import kinds


# Those that are simulated
SCHEDULES = {name: kind for name, kind in kinds.SCHEDULES.items() if name != "InterleavedZeroBubble"}


class Action(NamedTuple):
    """One piece of work of a rank: `kind` is F, I (gradient of inputs), W (of weights) or B (both)."""

    stage: int
    kind: str
    microbatch: int


# By rank, what it does one after the other. Of a pair that is to overlap neighbours get the results when both are done
Tables = list[list[tuple[Action, ...]]]
Times = Callable[[Action], float]  # seconds of an action


def check_schedule(schedule: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> int:
    """Stages a rank of a schedule.

    Raises:
        OptionError: for a name that is none, and for numbers that the schedule cannot take.
    """
    if schedule not in SCHEDULES:
        raise OptionError("--schedule", f"is one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if ranks < 1 or microbatches < 1:
        raise OptionError("--pp", f"{ranks} ranks and {microbatches} microbatches: both must be at least 1")
    stages = SCHEDULES[schedule].stages_per_rank
    if stages_per_rank is not None and stages_per_rank != stages:
        if not SCHEDULES[schedule].takes_more or stages_per_rank < stages:
            raise OptionError("--stages-per-rank", f"{schedule} has {stages}, not {stages_per_rank}")
        stages = stages_per_rank
    if schedule == "DualPipeV" and microbatches < 2 * ranks:
        raise OptionError(
            "--schedule", f"DualPipeV takes at least {2 * ranks} microbatches on {ranks} ranks, not {microbatches}"
        )
    if schedule == "Interleaved1F1B" and microbatches % max(1, microbatches // ranks):
        raise OptionError(
            "--schedule",
            f"Interleaved1F1B takes microbatches that divide into rounds of {ranks} or a little more, and "
            f"{microbatches} do not",
        )
    return stages


def action_tables(schedule: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Tables:
    """Torch's own order of each rank's work.

    Args:
        schedule: one of `SCHEDULES`.
        stages_per_rank: of Interleaved1F1B; 2 unless given.

    Raises:
        OptionError: as `check_schedule` does.
    """
    stages_per_rank = check_schedule(schedule, ranks, microbatches, stages_per_rank)
    cls = get_schedule_class(SCHEDULES[schedule].torch_name)
    stage = _Stage(ranks, ranks * stages_per_rank)
    if issubclass(cls, PipelineScheduleSingle):
        order = cls(stage, microbatches).pipeline_order
        # Torch 2.13's table of 1F1B counts the last rank's forwards from 1. All are in the order of the microbatches
        return [_counted(_computed(order[rank])) for rank in range(ranks)]
    order = _without_communication(cls)([stage] * stages_per_rank, microbatches).pipeline_order
    return [list(_computed(order[rank])) for rank in range(ranks)]


class _Stage:
    """What a schedule asks of a stage to make its table."""

    def __init__(self, ranks: int, num_stages: int):
        self.group_rank, self.group_size, self.num_stages = 0, ranks, num_stages
        self.submod = None
        self.stage_index_to_group_rank: dict[int, int] = {}


def _without_communication(cls: type) -> type:
    """The schedule without the table of sends and receives, which takes it minutes for hundreds of microbatches.

    Torch has no seam for the order alone; what is overridden is named in tests/test_seams.py.
    """

    def prepare(self: Any, actions: Any, format: str = "compute_only") -> None:
        pass

    return type(cls.__name__, (cls,), {"_prepare_schedule_with_comms": prepare})


def _computed(actions: Iterable[Any]) -> Iterator[tuple[Action, ...]]:
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield tuple(single for (single,) in _computed(action.sub_actions))
        elif (kind := action.computation_type.value) in ("F", "I", "W", "B"):
            yield (Action(action.stage_index, kind, action.microbatch_index),)


def _counted(actions: Iterable[tuple[Action, ...]]) -> list[tuple[Action, ...]]:
    counts = {"F": count(), "B": count()}
    return [(action._replace(microbatch=next(counts[action.kind])),) for (action,) in actions]


class Span(NamedTuple):
    """One action in time, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        spans: by rank, in order.
        most_alive: by stage, the most microbatches that hold activations at the same time.
    """

    spans: list[list[Span]]
    most_alive: dict[int, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the first action's start to the last one's end."""
        return max(spans[-1].end for spans in self.spans) - min(spans[0].start for spans in self.spans)

    @property
    def busy(self) -> list[float]:
        """Of each rank, the share of the span in which it works."""
        whole = self.seconds
        return [sum(span.end - span.start for span in spans) / whole for spans in self.spans]

    @property
    def idle(self) -> float:
        """The share of all ranks' time in which they wait."""
        return 1 - sum(self.busy) / len(self.busy)


class Program:
    """Action tables in an order in which each action comes after all that it waits for: that depends on no time.

    Raises:
        ValueError: the tables wait for each other for ever.
    """

    def __init__(self, tables: Tables):
        self.tables = tables
        rank_of = {action.stage: rank for rank, steps in enumerate(tables) for step in steps for action in step}
        self.last = max(rank_of)
        numbers: dict[Action, int] = {}
        sent: dict[Action, int] = {}  # whose end the neighbours wait for
        self.steps: list[tuple[Action, int, list[tuple[int, bool]]]] = []
        queues = [[(action, step) for step in steps for action in step] for steps in tables]
        places = [0] * len(tables)
        waiting: dict[Action, int] = {}
        ready = list(range(len(tables)))
        while ready:
            rank = ready.pop()
            while places[rank] < len(queues[rank]):
                action, step = queues[rank][places[rank]]
                before: list[tuple[int, bool]] = []  # number of the step, and whether its result has a way to go
                for needed in self._needed(action):
                    is_own = rank_of[needed.stage] == rank
                    number = (numbers if is_own else sent).get(needed)
                    if number is None:
                        waiting[needed] = rank
                        break
                    before.append((number, not is_own))
                else:
                    number = numbers[_asked_for_as(action)] = len(self.steps)
                    self.steps.append((action, rank, before))
                    places[rank] += 1
                    for result in map(_asked_for_as, step) if action is step[-1] else ():
                        sent[result] = number
                        if (waiter := waiting.pop(result, None)) is not None:
                            ready.append(waiter)
                    continue
                break
        if any(place < len(queue) for place, queue in zip(places, queues)):
            raise ValueError("the schedule's ranks wait for each other")

    def run(self, times: Times, delay: float = 0.0) -> Timeline:
        """When each action begins and ends.

        Args:
            times: seconds of an action.
            delay: seconds between the end of an action and when another rank has its result.
        """
        ends: list[float] = []
        spans: list[list[Span]] = [[] for _ in self.tables]
        clocks = [0.0] * len(self.tables)
        alive: dict[int, int] = defaultdict(int)
        most_alive: dict[int, int] = {}
        for action, rank, before in self.steps:
            start = clocks[rank]
            for number, is_far in before:
                start = max(start, ends[number] + delay if is_far else ends[number])
            end = clocks[rank] = start + times(action)
            ends.append(end)
            spans[rank].append(Span(action, start, end))
            if action.kind == "F":
                alive[action.stage] += 1
                most_alive[action.stage] = max(most_alive.get(action.stage, 0), alive[action.stage])
            elif action.kind != "I":  # the gradient of weights needs what the forward pass kept
                alive[action.stage] -= 1
        return Timeline(spans, most_alive)

    def _needed(self, action: Action) -> list[Action]:
        stage, kind, microbatch = action
        if kind == "F":
            return [Action(stage - 1, "F", microbatch)] if stage else []
        if kind == "W":
            return [Action(stage, "I", microbatch)]
        own = Action(stage, "F", microbatch)
        return [own] if stage == self.last else [own, Action(stage + 1, "I", microbatch)]


def _asked_for_as(action: Action) -> Action:
    """What waits for the gradient of inputs does not ask whether that of weights was computed with it."""
    return action._replace(kind="I") if action.kind == "B" else action


def stage_times(forward: Sequence[float], inputs: Sequence[float], weights: Sequence[float]) -> Times:
    """Times of actions from seconds by stage of a forward pass, of the gradient of inputs and of that of weights."""
    tables: Mapping[str, Sequence[float]] = {
        "F": forward,
        "I": inputs,
        "W": weights,
        "B": [i + w for i, w in zip(inputs, weights)],
    }
    return lambda action: tables[action.kind][action.stage]
