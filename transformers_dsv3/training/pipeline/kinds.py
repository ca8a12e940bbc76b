"""The schedules of `torch.distributed.pipelining` by the names that are asked for, and where their stages lie."""

from __future__ import annotations

from typing import NamedTuple


class ScheduleKind(NamedTuple):
    """A schedule of `torch.distributed.pipelining`.

    Attributes:
        torch_name: by which `get_schedule_class` finds it.
        stages_per_rank: how many it takes of each rank, at least. takes_more: whether more may be asked for.
        is_v: whether stages come back to the first rank (rank r has r and 2p - 1 - r), or go round (r, p + r, ...).
        least: fewest microbatches, in stages.
        splits_backward: whether the gradients of weights are computed apart from those of inputs.
    """

    torch_name: str
    stages_per_rank: int
    takes_more: bool
    is_v: bool
    least: int
    splits_backward: bool


SCHEDULES = {
    "GPipe": ScheduleKind("GPipe", 1, False, False, 0, False),
    "1F1B": ScheduleKind("1F1B", 1, False, False, 1, False),
    "Interleaved1F1B": ScheduleKind("Interleaved1F1B", 2, True, False, 0, False),
    "InterleavedZeroBubble": ScheduleKind("InterleavedZeroBubble", 2, True, False, 0, True),
    "ZBV": ScheduleKind("ZBVZeroBubble", 2, False, True, 0, True),
    "DualPipeV": ScheduleKind("DualPipeV", 2, False, True, 1, True),
}


def rank_of_stage(schedule: str, ranks: int, stage: int) -> int:
    """Which rank a stage is on."""
    lap, place = divmod(stage, ranks)
    return ranks - 1 - place if SCHEDULES[schedule].is_v and lap % 2 else place
