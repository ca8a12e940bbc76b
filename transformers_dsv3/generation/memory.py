"""How much memory there is for latents."""

import torch

from ..memory import free_memory


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device; without limit where a CPU's system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
