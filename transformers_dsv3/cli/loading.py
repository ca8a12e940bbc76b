"""What the verbs that load a checkpoint say of one that cannot be loaded, or of a device that is not there."""

from __future__ import annotations


# What Transformers takes for `device_map` besides the name of a device
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def device_problem(device: str) -> str | None:
    """Why nothing can be loaded on `device` here, in one line; None where it can."""
    import torch

    if device in DEVICE_MAPS:
        return None
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{device!r} is no device of this machine: {reason}"
    return None


def checkpoint_problem(checkpoint: str, error: Exception) -> str:
    """One line that names the checkpoint and says why loading it ended in `error`."""
    from ..data.local_paths import load_refusal

    return load_refusal(checkpoint, error)
