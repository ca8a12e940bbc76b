"""Where a prefill spends its time, by kind of operation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .devices import Device


# Parts of operations' names. Linear layers never multiply batches of matrices, attention does
ATTENTION = ("attention", "mla", "bmm")
LINEAR = ("mm", "linear", "experts", "mixture", "route", "project")


def kind_of(operations: list[str]) -> str:
    """`attention`, `linear` or `other`, by the names of an operation and of those that called it."""
    names = [name.lower() for name in operations]
    for kind, parts in (("attention", ATTENTION), ("linear", LINEAR)):
        if any(part in name for name in names for part in parts):
            return kind
    return "other"


def time_by_kind(run: Callable[[], Any], device: Device | None = None) -> dict[str, Any]:
    """Seconds that one call of `run` spends in each kind of operation, each operation without those it calls.

    On a GPU these are seconds of the GPU's programs, by the operation that started them.

    Returns:
        `linear_seconds`, `attention_seconds` and `other_seconds`, and `longest`, the ten operations that take the
        most, by name. Profiling itself costs some microseconds an operation, all of them in here.
    """
    on_gpu = device is not None and device.is_gpu
    with quiet_errors(), torch.autograd.profiler.profile(use_device="cuda" if on_gpu else None) as profiler:
        run()
        if device is not None:
            device.wait()
    seconds = {"linear": 0.0, "attention": 0.0, "other": 0.0}
    operations: dict[str, float] = {}
    for event in profiler.function_events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a program of the GPU, which counts where it was started
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
        seconds[kind_of(names)] += spent
        operations[event.name] = operations.get(event.name, 0.0) + spent
    longest = dict(sorted(operations.items(), key=lambda pair: -pair[1])[:10])
    return {**{f"{kind}_seconds": spent for kind, spent in seconds.items()}, "longest": longest}


@contextmanager
def quiet_errors() -> Iterator[None]:
    """Sends standard error nowhere: the profiler's library writes there that it starts and stops, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
