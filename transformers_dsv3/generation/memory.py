"""How much memory there is for latents."""

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU with the limit of a container, 2^62 where none is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [2**62]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        limits.append(most - used)
    except (OSError, ValueError):  # there is none, or "max", which is no number
        pass
    return max(min(limits), 0)
