"""Absorbed attention by two public packages for NVIDIA's Hopper GPUs: FlashMLA and FlashAttention 3.

Both serve where they are chosen by name, `TRANSFORMERS_DSV3_BACKENDS=attention=flash_mla` or
`attention=flash_attention_3_mla`, and leave what they do not take to the backends that `auto` would try. A package
that is installed is used; else Transformers' loader fetches it from the Hub, when the first call comes.

FlashAttention 3 takes queries and cache in the two parts that the cache keeps apart. FlashMLA wants the parts side by
side in pages of 64 positions, so the whole context is copied at every step: it is read twice and written once, three
times the memory traffic.
"""

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .operators import define
from .public_kernels import hub_refusal, nvidia_refusal
from .selection import PLAIN, call_refusal, chosen, logger
from .triton_support import compute_capability


PAGE = 64  # positions; the only size that FlashMLA takes


@dataclass(frozen=True)
class Package:
    """Where a kernel comes from.

    Args:
        module: what is imported where it is installed.
        source: where to install it from.
        repository, version: where it is on the Hub.
        function, argument: what is called, and an argument that releases without MLA lack.
        ranks: widths of latents it takes. rotary: widths of rotary keys.
    """

    module: str
    source: str
    repository: str
    version: int
    function: str
    argument: str
    ranks: tuple[int, ...]
    rotary: tuple[int, ...]


PACKAGES = {
    # github.com/deepseek-ai/FlashMLA, csrc/api/dense_decode.h: keys of 576, values of 512
    "flash_mla": Package(
        "flash_mla",
        "github.com/deepseek-ai/FlashMLA",
        "kernels-community/flash-mla",
        1,
        "flash_mla_with_kvcache",
        "block_table",
        (512,),
        (64,),
    ),
    # github.com/Dao-AILab/flash-attention, hopper/flash_api.cpp: with `qv`, heads of 64 at most and values from 256 on
    "flash_attention_3_mla": Package(
        "flash_attn_interface",
        "github.com/Dao-AILab/flash-attention, folder hopper",
        "kernels-community/flash-attn3",
        1,
        "flash_attn_with_kvcache",
        "qv",
        (256, 512),
        (8, 16, 24, 32, 40, 48, 56, 64),
    ),
}


def module_refusal(name: str, attention: nn.Module) -> str | None:
    """The reason why a package serves no call of an attention module, or None. Fetches and imports nothing.

    Args:
        name: one of `PACKAGES`.
        attention: has `kv_b_proj`, `kv_lora_rank` and `qk_rope_head_dim`.
    """
    weight = attention.kv_b_proj.weight
    return (
        _device_refusal(weight.device)
        or _shape_refusal(name, weight.dtype, attention.kv_lora_rank, attention.qk_rope_head_dim)
        or _package_refusal(name)
    )


def absorbed_refusal(
    q_nope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    """The reason why `absorbed_attention` does not take a call, or None where it does; a warning too, once."""
    name = chosen["attention"]
    if name not in PACKAGES:
        return f"attention is served by {name!r}, as chosen"
    reason = _call_refusal(name, q_nope, latent, k_rope, kv_b_weight, attention_mask)
    if reason is not None and not torch.compiler.is_compiling():
        logger.warning_once(f"attention={name} does not serve a call: it {reason}.")
    return reason


def absorbed_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output `(B, Q, H, V)`; arguments are those of the model's plain `absorbed_attention`, and:

    Args:
        attention_mask: None; every query may attend to all that is filled.
        filled: the number of positions that hold something, from the first on, integer of shape `()` or `(B,)` on the
            cache's device; None for all. What lies behind has to be numbers, and is not attended to.
    """
    B, H, _, N = q_nope_BHQN.shape
    w_uk_HNR, w_uv_HVR = kv_b_weight.view(H, -1, latent_BSR.shape[-1]).tensor_split([N], dim=1)
    lengths_B = None if filled is None else filled.to(torch.int32).expand(B).contiguous()
    operator = getattr(torch.ops.transformers_dsv3, chosen["attention"])
    out_BQHR = operator(
        torch.matmul(q_nope_BHQN, w_uk_HNR).transpose(1, 2),
        q_rope_BHQP.transpose(1, 2),
        latent_BSR,
        k_rope_BSP,
        lengths_B,
        scaling,
    )
    return torch.matmul(out_BQHR.transpose(1, 2), w_uv_HVR.transpose(1, 2)).transpose(1, 2)


def _shape_refusal(name: str, dtype: torch.dtype, rank: int, rotary: int) -> str | None:
    package = PACKAGES[name]
    if dtype is not torch.bfloat16 and dtype is not torch.float16:
        return f"takes bf16 and fp16, not {dtype}"
    if rank not in package.ranks:
        return f"takes latents of {' or '.join(map(str, package.ranks))}, not {rank}"
    if rotary not in package.rotary:
        return f"takes rotary keys of {' or '.join(map(str, package.rotary))}, not {rotary}"
    return None


def _call_refusal(
    name: str,
    q_nope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    if (reason := _device_refusal(q_nope.device)) is not None:
        return reason
    if attention_mask is not None:
        return "takes no mask, which padding on the left and several queries at once need"
    if (reason := _shape_refusal(name, q_nope.dtype, latent.shape[-1], k_rope.shape[-1])) is not None:
        return reason
    if torch.is_autocast_enabled(q_nope.device.type):
        return "does not follow autocast"
    if (reason := call_refusal()) is not None:
        return reason
    for tensor in (q_nope, latent, k_rope, kv_b_weight):
        if tensor.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
        if tensor.dtype is not q_nope.dtype:
            return f"takes weights and caches of the activations' dtype ({q_nope.dtype}), not {tensor.dtype}"
        if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor):
            return f"takes plain tensors, not {type(tensor).__name__}"
        if tensor.stride(-1) != 1:
            return "takes tensors whose last dimension is contiguous"
    if not kv_b_weight.is_contiguous():
        return "takes a contiguous kv_b_proj only"
    return _load_refusal(name)


def _device_refusal(device: torch.device) -> str | None:
    if (reason := nvidia_refusal(device)) is not None:
        return reason
    major, minor = _capability(device.index)
    return None if major == 9 else f"needs a Hopper GPU, compute capability 9.0, this one has {major}.{minor}"


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return compute_capability(index)


def _package_refusal(name: str) -> str | None:
    package = PACKAGES[name]
    if importlib.util.find_spec(package.module) is not None or (reason := hub_refusal()) is None:
        return None
    return f"is not installed ({package.source}); as {package.repository} from the Hub it {reason}"


@torch.compiler.assume_constant_result
def _load_refusal(name: str) -> str | None:
    loaded = _loaded(name)
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _loaded(name: str) -> ModuleType | str:
    """A package, imported or fetched; or the reason why it cannot be used."""
    package = PACKAGES[name]
    if (reason := _package_refusal(name)) is not None:
        return reason
    try:
        if importlib.util.find_spec(package.module) is not None:
            module = importlib.import_module(package.module)
        else:
            from transformers.integrations.hub_kernels import get_kernel

            module = get_kernel(package.repository, version=package.version)
        arguments = inspect.signature(getattr(module, package.function)).parameters
    except Exception as error:  # whatever a package's import or the Hub raises, another backend takes the call
        return f"could not be loaded ({type(error).__name__}: {error})"
    if package.argument not in arguments:
        return f"is a release of {package.module} without multi-head latent attention ({package.source})"
    return module


def _flash_mla(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    lengths_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    B, S, R = latent_BSR.shape
    Q, H = q_latent_BQHR.shape[1:3]
    pages = -(-S // PAGE)
    kv_BSX = latent_BSR.new_empty(B, pages * PAGE, R + k_rope_BSP.shape[-1])
    kv_BSX[:, :S, :R] = latent_BSR
    kv_BSX[:, :S, R:] = k_rope_BSP
    # Not every release clears the end of the last page, and what is not a number stays so when multiplied by zero
    kv_BSX[:, S:] = 0
    if lengths_B is None:
        lengths_B = torch.full((B,), S, dtype=torch.int32, device=latent_BSR.device)
    module = _loaded("flash_mla")
    # The schedule depends on the lengths, so that a layer may use another's only if these are known to be the same
    schedule, splits = module.get_mla_metadata(lengths_B, Q * H, 1)  # type: ignore[union-attr]
    out_BQHR, _ = module.flash_mla_with_kvcache(  # type: ignore[union-attr]
        torch.cat([q_latent_BQHR, q_rope_BQHP], dim=-1),
        kv_BSX.view(B * pages, PAGE, 1, -1),
        torch.arange(B * pages, dtype=torch.int32, device=latent_BSR.device).view(B, pages),
        lengths_B,
        R,
        schedule,
        splits,
        softmax_scale=scaling,
        causal=False,
    )
    return out_BQHR


def _flash_attention_3_mla(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    lengths_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    return _loaded("flash_attention_3_mla").flash_attn_with_kvcache(  # type: ignore[union-attr]
        q_rope_BQHP,
        k_rope_BSP.unsqueeze(2),
        latent_BSR.unsqueeze(2),
        qv=q_latent_BQHR,
        cache_seqlens=lengths_B,
        softmax_scale=scaling,
        causal=False,
    )


def _fake(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    lengths_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    return q_latent_BQHR.new_empty(q_latent_BQHR.shape)


for _name, _kernel in (("flash_mla", _flash_mla), ("flash_attention_3_mla", _flash_attention_3_mla)):
    define(
        f"{_name}(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor? lengths, float scaling) "
        "-> Tensor",
        _kernel,
        _fake,
    )
