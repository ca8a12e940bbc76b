"""How a checkpoint is asked to be loaded: in which dtype, on which device. What cannot be is refused by its option."""

from __future__ import annotations

from ..option_error import OptionError


DTYPES = ("auto", "float32", "bfloat16", "float16")
# What Transformers takes for `device_map` besides the name of a device
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_dtype(dtype: str) -> None:
    """Refuse what no model is loaded in. Raises `OptionError`."""
    if dtype not in DTYPES:
        raise OptionError("--dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")


def check_device(device: str | None) -> None:
    """Refuse a device on which nothing can be loaded here; None is the default. Raises `OptionError`."""
    if device is None or device in DEVICE_MAPS:
        return

    import torch

    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError("--device", f"{device!r} is no device of this machine: {reason}") from error
