"""What is said of a checkpoint that cannot be loaded or measured as asked, or of a device that is not there."""

from __future__ import annotations

from pathlib import Path


# What Transformers takes for `device_map` besides the name of a device
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class RefusedOption(ValueError):
    """What was asked for cannot be done. `option` is the command-line option, or the argument, that asks for it."""

    def __init__(self, option: str, message: str):
        super().__init__(message)
        self.option = option


def device_problem(device: str) -> str | None:
    """Why nothing can be loaded on `device` here, in one line; None where it can."""
    import torch

    if device in DEVICE_MAPS:
        return None
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        return f"{device!r} is no device of this machine: {_first_line(error)}"
    return None


def checkpoint_problem(checkpoint: str, error: Exception) -> str:
    """One line that names the checkpoint and says why loading it ended in `error`."""
    from ..data.local_paths import looks_like_path

    # Of a path that does not exist, Transformers says that it is no valid name of a repository.
    if not Path(checkpoint).exists() and looks_like_path(checkpoint):
        return f"{checkpoint}: no such folder"
    return f"{checkpoint}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
