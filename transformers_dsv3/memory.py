"""How much memory this machine has, and how much of it can still be taken; the standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


# Where the system says so; tests put others in its place
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What stands for a limit where there is none
UNLIMITED = 2**62


def meminfo() -> dict[str, int]:
    """`/proc/meminfo` in bytes; empty where there is none."""
    return _kilobytes(PROC / "meminfo")


def total_memory() -> int:
    """Bytes of memory that programs here may use together, with the limit of a container; without one where the system
    does not tell.
    """
    return min([meminfo().get("MemTotal", UNLIMITED), *(group.limit for group in _groups())])


def free_memory() -> int:
    """Bytes that a program can still take, with the limits of containers; without one where the system does not tell.

    What files that nobody has read lately take of a container's memory counts as free: the system gives it up first.
    """
    free = min([meminfo().get("MemAvailable", UNLIMITED), *(group.limit - group.used for group in _groups())])
    return max(free, 0)


def resident_bytes() -> dict[str, int | None]:
    """Resident memory of this process, `now` and at its `peak`; None where the system does not tell."""
    values = _kilobytes(PROC / "self" / "status")
    return {"now": values.get("VmRSS"), "peak": values.get("VmHWM")}


def _kilobytes(path: Path) -> dict[str, int]:
    """Lines such as `VmRSS: 12 kB`, in bytes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


class _Group:
    """A control group with a limit of memory.

    Raises:
        OSError, ValueError: there is none.
    """

    def __init__(self, folder: Path, limit: str, used: str, inactive: str):
        self.limit = int((folder / limit).read_text(encoding="utf-8"))  # "max" is no number
        self._folder, self._used, self._inactive = folder, used, inactive

    @property
    def used(self) -> int:
        """Bytes, without those of files that nobody has read lately; 0 where the system does not tell."""
        with contextlib.suppress(OSError, ValueError):
            taken = int((self._folder / self._used).read_text(encoding="utf-8"))
            lines = (self._folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            return taken - int(dict(line.split() for line in lines).get(self._inactive, 0))
        return 0


def _groups() -> Iterator[_Group]:
    """Control groups that this process is in and that have a limit, by either version of them."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for controllers, group in (line.split(":", 2)[1:] for line in lines):
        if controllers == "":
            top, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = GROUPS / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Within a container the outer groups may be out of sight
        for folder in (top / group.lstrip("/"), *(top / group.lstrip("/")).parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):
                    yield _Group(folder, *names)
