"""Whether programs written in Triton can take a call here, and why not.

They run on NVIDIA GPUs from compute capability 8.0 and on AMD GPUs that ROCm's torch runs on; both are "cuda" to
torch. Under Triton's interpreter (`TRITON_INTERPRET=1` before Triton is imported) they run on the CPU, slowly, where
they were asked for by name: that is how they are tested without a GPU.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os

import torch
from packaging import version

from .selection import PLAIN, PUBLIC_ATTENTION, call_refusal, chosen, logger


NAME = "triton"
# What torch 2.11 comes with; older ones were not tried
OLDEST = "3.6.0"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which torch for GPUs comes with"
    installed = importlib.metadata.version("triton") if _distribution("triton") else None
    if installed is not None and version.parse(installed) < version.parse(OLDEST):
        return f"needs triton {OLDEST} or newer, {installed} is installed"
    return None


def _distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False  # ROCm's torch carries it under another name
    return True


@functools.cache
def compute_capability(index: int | None) -> tuple[int, int]:
    """Of an NVIDIA GPU, such as (9, 0). AMD's count as the newest, and so do tensors of a GPU that is not here."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return (99, 0)
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def _missing_refusal() -> str | None:
    return _missing()


def interpreted() -> bool:
    """Whether Triton interprets programs on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_refusal(tensor: torch.Tensor) -> str | None:
    """The reason why Triton's programs cannot run where a tensor lies, or None where they can."""
    if (missing := _missing_refusal()) is not None:
        return missing
    if tensor.is_cpu and interpreted():
        return None
    if not tensor.is_cuda:
        return f"is for GPUs, not {tensor.device.type}"
    if interpreted():
        return "is interpreted on the CPU, as TRITON_INTERPRET asks"
    if compute_capability(tensor.device.index) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes a tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision() -> str:
    """How products of fp32 are computed: as PyTorch's own are on NVIDIA GPUs."""
    tf32 = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def triton_refusal(operation: str, x: torch.Tensor, *weights: torch.Tensor) -> str | None:
    """The reason why Triton's programs do not take a call, or None where they do. Says nothing about gradients.

    Where they were chosen by name, the reason is also given as a warning, once.

    Args:
        operation: "linear", "attention" or "experts".
        x: activations. weights: of their dtype, or INT8; a cache's tensors count as weights.
    """
    # Experts are chosen by the model's configuration, which the environment has a say in when the model is made
    choice = "auto" if operation == "experts" else chosen[operation]
    if choice not in ("auto", NAME, *PUBLIC_ATTENTION):
        return f"{operation} is served by {choice!r}, as chosen"
    reason = _refusal(x, weights)
    if reason is None and choice != NAME and operation != "experts" and x.is_cpu:
        reason = "is interpreted where it is asked for by name only"
    if reason is not None and choice == NAME and not torch.compiler.is_compiling():
        logger.warning_once(f"The Triton backend does not serve {operation}: it {reason}.")
    return reason


def _refusal(x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> str | None:
    # Every call of every layer comes through here: in decoding, microseconds count
    if (reason := device_refusal(x)) is not None:
        return reason
    dtype = x.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float16 and dtype is not torch.float32:
        return f"takes bf16, fp16 and fp32, not {dtype}"
    if (reason := call_refusal()) is not None:
        return reason
    if type(x) not in PLAIN:
        return f"takes plain tensors, not {type(x).__name__}"
    for weight in weights:
        if type(weight) not in PLAIN:
            return f"takes plain tensors, not {type(weight).__name__}"
        if weight.dtype is not dtype and weight.dtype is not torch.int8:
            return f"takes weights and caches of the activations' dtype ({dtype}), not {weight.dtype}"
        if weight.device != x.device:
            return f"needs weights on {x.device}, not on {weight.device}"
    return None
