"""Every sensible split of a model over so many GPUs, and the fastest that fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...option_error import OptionError
from .gpus import Gpu
from .schedules import SCHEDULES
from .splits import Estimate, Plan, Split, Workload, estimate, plan
from .units import RECOMPUTATION


# Of each way to divide the GPUs, the variants that are worked out in full until one fits
_VARIANTS = 6


@dataclass(frozen=True)
class Wanted:
    """What splits may be: None for anything sensible.

    Args:
        tp, pp, ep: sizes.
        schedule, recompute: by name.
        fp8: True or False.
    """

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    recompute: str | None = None
    fp8: bool | None = None


ANYTHING = Wanted()


def possible_splits(workload: Workload, gpus: int, gpu: Gpu, wanted: Wanted = ANYTHING) -> Iterator[Split]:
    """All of them, memory aside.

    Raises:
        OptionError: for a number of GPUs that is not at least 1, and for something wanted that no split can have.
    """
    if gpus < 1:
        raise OptionError("--gpus", f"must be at least 1, not {gpus}")
    if wanted.schedule not in (None, *SCHEDULES):
        raise OptionError("--schedule", f"is one of {', '.join(SCHEDULES)}, not {wanted.schedule!r}")
    if wanted.schedule is not None and wanted.pp == 1:
        raise OptionError("--schedule", "is for a pipeline, and --pp is 1")
    config = workload.config
    found: dict[str, OptionError] = {}
    any_found = False
    for tp in [wanted.tp] if wanted.tp is not None else [n for n in (1, 2, 4, 8) if n <= min(gpus, gpu.per_node)]:
        pps = [wanted.pp] if wanted.pp is not None else [n for n in _powers(64) if n <= config.num_hidden_layers]
        for pp in pps:
            if tp < 1 or pp < 1 or gpus % (tp * pp):
                found.setdefault("tp", OptionError("--gpus", f"{gpus} do not divide by TP {tp} times PP {pp}"))
                continue
            dp = gpus // (tp * pp)
            eps = [n for n in _powers(config.n_routed_experts) if n <= dp * tp] if config.moe_layers else [1]
            for ep in [wanted.ep] if wanted.ep is not None else eps:
                for split in _variants(tp, pp, ep, dp, gpu, wanted):
                    try:
                        split.check(workload, gpu)
                    except OptionError as error:
                        found.setdefault(error.option, error)
                        continue
                    any_found = True
                    yield split
    if not any_found:
        raise next(iter(found.values()))


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _variants(tp: int, pp: int, ep: int, dp: int, gpu: Gpu, wanted: Wanted) -> Iterator[Split]:
    schedules: Sequence[str | None]
    if pp == 1:
        schedules = [] if wanted.schedule is not None else [None]
    elif wanted.schedule is not None:
        schedules = [wanted.schedule]
    else:
        schedules = ["1F1B", "Interleaved1F1B", "ZBV", "DualPipeV"]  # GPipe's holds more and waits as long as 1F1B
    for schedule in schedules:
        for fp8 in [wanted.fp8] if wanted.fp8 is not None else [False, *([True] if gpu.fp8 is not None else [])]:
            for recompute in [wanted.recompute] if wanted.recompute is not None else RECOMPUTATION:
                for sharded in (False, True) if pp == 1 and dp > 1 else (False,):
                    yield Split(tp, pp, ep, dp, schedule, recompute, fp8, sharded)


def fastest(
    workload: Workload,
    gpus: int,
    gpu: Gpu,
    wanted: Wanted = ANYTHING,
    top: int = 10,
    tries: int = 60,
) -> list[Plan]:
    """The fastest variant that fits of each way to divide the GPUs, the fastest way first.

    Args:
        wanted: what splits have to be.
        top: how many ways.
        tries: simulated steps to find a better cut of each pipeline by.

    Returns:
        `top` plans at the most; where nothing fits, the one that comes nearest to it.

    Raises:
        OptionError: as `possible_splits` does.
    """
    if top < 1:
        raise OptionError("--top", f"must be at least 1, not {top}")
    ways: dict[tuple[int, int, int], list[tuple[Estimate, Split]]] = defaultdict(list)
    for split in possible_splits(workload, gpus, gpu, wanted):
        ways[split.tp, split.pp, split.ep].append((estimate(workload, split, gpu), split))

    def order(variant: tuple[Estimate, Split]) -> tuple[bool, float]:
        return variant[0].memory_bytes > gpu.room, variant[0].seconds

    for variants in ways.values():
        variants.sort(key=order)
    best: list[Plan] = []
    nearest: Plan | None = None
    for variants in sorted(ways.values(), key=lambda variants: order(variants[0])):
        if len(best) == top:
            break
        for guess, split in variants[:_VARIANTS]:
            if nearest is not None and guess.memory_bytes > gpu.room:
                break  # some split has shown by now how near one comes
            try:
                made = plan(workload, split, gpu, tries)
            except OptionError:
                continue  # more stages than pieces
            if made.fits:
                best.append(made)
                break
            if nearest is None or made.memory_bytes < nearest.memory_bytes:
                nearest = made
    if not best and nearest is None:
        raise OptionError("--pp", "has more stages than the model has halves of layers")
    return sorted(best, key=lambda made: made.seconds) if best else [nearest]  # type: ignore[list-item]
