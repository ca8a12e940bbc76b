"""What of a decoding step is not computing: the time that the host takes around the kernels, and how many it calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..kernels.cpu import library
from .prefill_profile import quiet_errors


STEP = "dsv3_step"  # the compiled function that makes a step of all layers


@dataclass
class Calls:
    """Calls of kernels: how many, and the seconds within them."""

    number: float = 0
    seconds: float = 0.0


class _Timed:
    """The compiled library, the seconds of each call kept by its operator's name."""

    def __init__(self, loaded: Any, seconds: dict[str, list[float]]):
        self._loaded, self._seconds = loaded, seconds

    def __getattr__(self, name: str) -> Any:
        operator, seconds = getattr(self._loaded, name), self._seconds.setdefault(name, [])

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operator(*arguments)
            seconds.append(time.perf_counter() - started)
            return result

        setattr(self, name, timed)
        return timed


@contextmanager
def _compiled_calls() -> Iterator[dict[str, list[float]]]:
    kept = library.loaded
    seconds: dict[str, list[float]] = {}
    library.loaded = _Timed(kept, seconds)
    try:
        yield seconds
    finally:
        library.loaded = kept


def _calls_of_torch(decode: Callable[[int], Any], tokens: int) -> Calls:
    with quiet_errors(), torch.autograd.profiler.profile() as profiler:
        decode(tokens)
    events = [event for event in profiler.function_events if event.name.startswith("aten::")]
    number = sum(not event.cpu_children for event in events)
    return Calls(number, sum(event.self_cpu_time_total for event in events) * 1e-6)


def kernel_calls(decode: Callable[[int], Any], few: int = 2, more: int = 10) -> Calls:
    """Calls of kernels in one step of decoding on a CPU.

    They are those of the compiled library, each operator at the median of its calls, and, unless a program makes the
    step, PyTorch's own: of one that is made of others its own part only, with the microsecond or so that profiling
    adds. Around a program, which would not run beside a profiler, PyTorch's few operators (embedding, choice of the
    token) count as the host's. What a call of `generate` does once falls out, as the difference between two lengths.

    Args:
        decode: decodes as many tokens as it is told.
    """
    steps = more - few
    with _compiled_calls() as first:
        decode(few)
    with _compiled_calls() as second:
        decode(more)
    each_step = {name: (len(seconds) - len(first.get(name, ()))) / steps for name, seconds in second.items()}
    seconds = sum(each_step[name] * median(each) for name, each in second.items() if each)
    calls = Calls(sum(each_step.values()), seconds)
    if STEP not in second:
        before, after = _calls_of_torch(decode, few), _calls_of_torch(decode, more)
        calls.number += (after.number - before.number) / steps
        calls.seconds += (after.seconds - before.seconds) / steps
    return Calls(round(calls.number), calls.seconds)
