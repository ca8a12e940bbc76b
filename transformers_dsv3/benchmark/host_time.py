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


@dataclass
class Calls:
    """Calls of kernels: how many, and the seconds within them."""

    number: int = 0
    seconds: float = 0.0


class _Counted:
    """The compiled library, its operators counted and timed."""

    def __init__(self, loaded: Any, calls: Calls):
        self._loaded, self._calls = loaded, calls

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._loaded, name)

        def counted(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operator(*arguments)
            self._calls.seconds += time.perf_counter() - started
            self._calls.number += 1
            return result

        setattr(self, name, counted)
        return counted


@contextmanager
def _compiled_calls(calls: Calls) -> Iterator[None]:
    kept = library.loaded
    library.loaded = _Counted(kept, calls)
    try:
        yield
    finally:
        library.loaded = kept


def kernel_calls(decode: Callable[[int], Any], few: int = 2, more: int = 6) -> Calls:
    """Calls of kernels in one step of decoding on a CPU: PyTorch's own and those of the compiled library.

    What a call of `generate` does once falls out, as the difference between two lengths. An operator of PyTorch that
    is made of others counts with its own part only; profiling adds about a microsecond to each.

    Args:
        decode: decodes as many tokens as it is told.
    """
    counted = []
    for tokens in (few, more):
        compiled, own = Calls(), Calls()
        with quiet_errors(), torch.autograd.profiler.profile() as profiler, _compiled_calls(compiled):
            decode(tokens)
        for event in profiler.function_events:
            if event.name.startswith("aten::"):
                own.number += not event.cpu_children
                own.seconds += event.self_cpu_time_total * 1e-6
        counted.append(Calls(compiled.number + own.number, compiled.seconds + own.seconds))
    steps = more - few
    return Calls(
        round((counted[1].number - counted[0].number) / steps), (counted[1].seconds - counted[0].seconds) / steps
    )
