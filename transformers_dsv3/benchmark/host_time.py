"""What of a decoding step is not computing: the time that the host takes around the kernels, and how many it calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


class _Counted:
    """The compiled library, its operators counted and timed by name."""

    def __init__(self, loaded: Any, calls: dict[str, Calls]):
        self._loaded, self._calls = loaded, calls

    def __getattr__(self, name: str) -> Any:
        operator, calls = getattr(self._loaded, name), self._calls.setdefault(name, Calls())

        def counted(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operator(*arguments)
            calls.seconds += time.perf_counter() - started
            calls.number += 1
            return result

        setattr(self, name, counted)
        return counted


@contextmanager
def _compiled_calls() -> Iterator[dict[str, Calls]]:
    kept = library.loaded
    calls: dict[str, Calls] = {}
    library.loaded = _Counted(kept, calls)
    try:
        yield calls
    finally:
        library.loaded = kept


def _calls_of(decode: Callable[[int], Any], tokens: int) -> Calls:
    """Calls while so many tokens are decoded."""
    with _compiled_calls() as compiled:
        decode(tokens)
    calls = [each for each in compiled.values() if each.number]
    if not compiled.get(STEP, Calls()).number:
        # The program of a step would not run where a profiler looks on; without one PyTorch's operators are many
        with quiet_errors(), torch.autograd.profiler.profile() as profiler:
            decode(tokens)
        events = [event for event in profiler.function_events if event.name.startswith("aten::")]
        number = sum(not event.cpu_children for event in events)
        calls.append(Calls(number, sum(event.self_cpu_time_total for event in events) * 1e-6))
    return Calls(sum(each.number for each in calls), sum(each.seconds for each in calls))


def kernel_calls(decode: Callable[[int], Any], few: int = 2, more: int = 6) -> Calls:
    """Calls of kernels in one step of decoding on a CPU.

    They are those of the compiled library, and, unless a program makes the step, PyTorch's own: of one that is made of
    others its own part only, with the microsecond or so that profiling adds. Around a program, PyTorch's few operators
    (embedding, choice of the token) count as the host's. What a call of `generate` does once falls out, as the
    difference between two lengths.

    Args:
        decode: decodes as many tokens as it is told.
    """
    first, second = _calls_of(decode, few), _calls_of(decode, more)
    steps = more - few
    return Calls(round((second.number - first.number) / steps), (second.seconds - first.seconds) / steps)
