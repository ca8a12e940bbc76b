"""What kernels of other projects need: a GPU of NVIDIA's, a package, or leave to fetch them from the Hub.

Reasons that Transformers' own checks know are asked of these, so that they hold for the version installed.
"""

import os
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.deepgemm import is_deepgemm_loadable
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.utils import (
    ENV_VARS_TRUE_VALUES,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

from .triton_support import compute_capability


FLASH_ATTENTION = {
    2: (is_flash_attn_2_available, "`pip install flash-attn`"),
    3: (is_flash_attn_3_available, "github.com/Dao-AILab/flash-attention, folder hopper"),
}


def nvidia_refusal(device: torch.device) -> str | None:
    """The reason why kernels for NVIDIA's GPUs cannot run on a device, or None where they can."""
    if device.type != "cuda":
        return "needs a GPU"
    return "is for NVIDIA's GPUs" if torch.version.hip is not None else None


def hub_refusal() -> str | None:
    """The reason why Transformers fetches no kernels from the Hub here, or None where it does."""
    if os.environ.get("USE_HUB_KERNELS", "YES").upper() not in ENV_VARS_TRUE_VALUES:
        return "may not be fetched from the Hub, as USE_HUB_KERNELS says"
    if not is_kernels_available():
        return f'needs `pip install "kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"`, which fetches it'
    return None


def flash_attention_refusal(release: int, module: nn.Module) -> str | None:
    """The reason why Transformers' `flash_attention_2` or `_3` cannot serve a module, or None where it can."""
    if next(module.parameters()).device.type != "cuda":
        return "needs a GPU"
    available, source = FLASH_ATTENTION[release]
    if available() or (reason := hub_refusal()) is None:
        return None
    return f"is not installed ({source}); from the Hub it {reason}"


def sonicmoe_refusal(experts: nn.Module) -> str | None:
    """The reason why Transformers' `sonicmoe` cannot serve a module of experts, or None where it can."""
    return _experts_refusal(experts, (torch.bfloat16, torch.float16), is_sonicmoe_loadable)


def deepgemm_refusal(experts: nn.Module) -> str | None:
    """The reason why Transformers' `deepgemm` cannot serve a module of experts, or None where it can."""
    return _experts_refusal(experts, (torch.bfloat16,), is_deepgemm_loadable)


def _experts_refusal(experts: nn.Module, dtypes: tuple[torch.dtype, ...], loadable: Callable) -> str | None:
    weight = experts.down_proj
    if (reason := nvidia_refusal(weight.device)) is not None:
        return reason
    if weight.dtype not in dtypes:
        return f"takes {' and '.join(str(d).removeprefix('torch.') for d in dtypes)} weights, not {weight.dtype}"
    if (reason := hub_refusal()) is not None:
        return reason
    try:
        loadable(raise_error=True)
    except ImportError as error:
        return str(error).rstrip(".")
    return None


def grouped_mm_refusal(experts: nn.Module) -> str | None:
    """The reason why Transformers' `grouped_mm` cannot serve a module of experts, or None where it can."""
    weight = next(experts.parameters())
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16 weights, not {weight.dtype}"
    if weight.is_cuda and compute_capability(weight.device.index) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None
