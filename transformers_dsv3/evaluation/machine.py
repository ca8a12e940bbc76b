"""Facts of this machine that records and checks ask for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


# Above this many runnable processes a core before anything is measured, times are of a machine that is shared
BUSY = 0.25


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, load average and versions."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": meminfo().get("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_dsv3": importlib.metadata.version("transformers-dsv3") if _installed() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": load_average(),
    }


def _installed() -> bool:
    try:
        importlib.metadata.version("transformers-dsv3")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return False
    return True


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_warning(load: float | None, cores: int) -> str | None:
    """What to tell where other programs run; None on a quiet machine."""
    if load is None or load <= BUSY * cores:
        return None
    return (
        f"The load average is {load:.2f} on {cores} cores: other programs are running, and times will be longer and "
        "less even than this machine's own. Ratios of interleaved rounds suffer least."
    )


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def meminfo() -> dict[str, int]:
    """`/proc/meminfo` in bytes; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def free_memory() -> int:
    """Bytes that a program can still take; without limit where the system does not tell."""
    return meminfo().get("MemAvailable", 2**62)


def resident_bytes() -> dict[str, int | None]:
    """Resident memory of this process, `now` and at its `peak`; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"now": None, "peak": None}
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": values["VmRSS"], "peak": values["VmHWM"]}
