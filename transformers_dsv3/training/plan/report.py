"""Plans as a file and as a picture, and amounts of tokens as people write them."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import write_json
from ...option_error import OptionError
from .idle import stage_names
from .layout import Pipeline
from .schedules import Timeline
from .splits import Plan


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_tokens(text: str) -> float:
    """How many tokens 14.8T, 300B or 1000000 are.

    Raises:
        OptionError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    if match is None or not float(match[1]):
        raise OptionError("--tokens", f"is an amount such as 14.8T or 300B, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def write_plans(path: Path, plans: list[Plan], tokens: float, price_per_hour: float) -> None:
    """Every figure of plans as JSON."""
    write_json(path, [_entry(plan, tokens, price_per_hour) for plan in plans])


def _entry(plan: Plan, tokens: float, price_per_hour: float) -> dict[str, Any]:
    return {
        "split": asdict(plan.split),
        "gpu": asdict(plan.gpu),
        "fits": plan.fits,
        "seconds_a_step": plan.seconds,
        "seconds_by_part": plan.parts,
        "memory_bytes": plan.memory,
        "stages": stage_names(plan.workload.units, plan.bounds),
        "busy_share_by_rank": plan.busy,
        "idle_share": plan.idle,
        "tokens_per_second_a_gpu": plan.tokens_per_second,
        "flops_a_gpu": plan.flops,
        "utilisation": plan.utilisation,
        "tokens": tokens,
        "days": plan.days(tokens),
        "gpu_hours": plan.gpu_hours(tokens),
        "dollars": plan.gpu_hours(tokens) * price_per_hour,
    }


def drawn(plan: Plan) -> list[tuple[str, Timeline]]:
    """A plan's pipeline with few microbatches, and 1F1B's of the same stages' times under it; nothing without one."""
    pipeline = plan.pipeline
    if pipeline is None:
        return []
    few = Pipeline(
        pipeline.schedule, pipeline.ranks, min(pipeline.microbatches, 2 * pipeline.ranks), pipeline.given_stages
    )
    timelines = [(f"{plan.split}, {few.microbatches} microbatches", few.run(plan.times, plan.bounds))]
    if few.schedule != "1F1B":
        plain = Pipeline("1F1B", few.ranks, few.microbatches)
        timelines.append(
            (f"1F1B, cut by cost, {few.microbatches} microbatches", plain.run(plan.times, plain.cut(plan.times)))
        )
    return timelines
