"""The device that is measured: how time is taken there, how much memory is free, and what it says about itself.

A GPU works behind the host's back, so the host's clock sees when work was handed over, not when it was done: there,
times are those between events that the device itself stamps.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..evaluation import machine
from ..memory import free_memory
from ..option_error import OptionError


Result = TypeVar("Result")
# Read before and after a run: a GPU that is hot, capped or busy with something else is slower than its name says
STATE = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate", "utilization.gpu")


@dataclass(frozen=True)
class Device:
    """Where models lie and run.

    Args:
        kind: "cpu", or "cuda" for the current GPU, NVIDIA's or AMD's, as torch names both.
    """

    kind: str = "cpu"

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def torch(self) -> torch.device:
        """Where tensors are made."""
        return torch.device(self.kind)

    def wait(self) -> None:
        """Until everything that was handed over is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point of time, for `seconds_between`: after the work that was handed over before, without waiting."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each of the marks to the next; waits for the last."""
        if not self.is_gpu:
            return [after - before for before, after in zip(marks, marks[1:])]
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:])]

    def timed(self, run: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds that a call takes, from an idle device to the end of its work, and what it returns."""
        self.wait()
        before = self.mark()
        result = run()
        return self.seconds_between([before, self.mark()])[0], result

    def free_memory(self) -> int:
        """Bytes that models can still take; without limit where the system does not tell."""
        if not self.is_gpu:
            return free_memory()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def tidy(self) -> None:
        """Gives back memory that only PyTorch's own pool holds on to."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def record(self) -> dict[str, Any]:
        """Name, memory, driver and state of a GPU; empty for the CPU, which `machine_facts` describes."""
        if not self.is_gpu:
            return {}
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": found.name,
            "architecture": getattr(found, "gcnArchName", None) or f"sm_{found.major}{found.minor}",
            "memory_bytes": found.total_memory,
            "free_bytes": torch.cuda.mem_get_info()[0],
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
            "triton": machine.package_version("triton"),
            **nvidia_smi(("driver_version",)),
            "state": nvidia_smi(STATE),
        }


def find_device(name: str) -> Device:
    """The device of `--device`: `auto` is a GPU where torch sees one, and the CPU elsewhere.

    Raises:
        OptionError: for a GPU where there is none.
    """
    if name == "auto":
        return Device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "it sees no GPU" if built else "it is a build for CPUs"
        raise OptionError("--device", f"torch {torch.__version__} has no GPU to use here: {reason}")
    return Device(name)


def nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    """What NVIDIA's own program says of the current GPU; empty where it is missing or knows no such GPU."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return {}
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if uuid is not None:
        command.append(f"--id=GPU-{uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[0].split(",") if done.stdout.strip() else []
    return dict(zip(fields, (value.strip() for value in values)))
