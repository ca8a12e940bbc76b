"""Which implementation may serve an operation: the caller's choice, the environment's, or the best one that can.

`experts_implementation="auto"`, the default, chooses for each call. Modules in training mode leave the compiled
backend out, with gradients or without: checkpointing that runs forward once without them and once with them has to
compute the same twice. The environment variable `TRANSFORMERS_DSV3_BACKENDS` replaces the default where the caller
chose nothing, as in

    TRANSFORMERS_DSV3_BACKENDS=experts=eager,linear=torch,attention=torch,isa=avx2,pages=normal
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules
from torch.utils._device import DeviceContext
from transformers.activations import SiLUActivation
from transformers.utils import logging

from .cpu import library as cpu_library


logger = logging.get_logger(__name__)

VARIABLE = "TRANSFORMERS_DSV3_BACKENDS"
# Other projects' kernels for absorbed attention (`mla_flash`). `auto` leaves them out: they have to be asked for, and
# what they do not take is served as by `auto`.
PUBLIC_ATTENTION = ("flash_mla", "flash_attention_3_mla")
# For "experts" any name that Transformers knows is a choice, and is checked when a model is made.
CHOICES = {
    "linear": ("auto", "torch", "cpu", "triton"),
    "attention": ("auto", "torch", "cpu", "triton", *PUBLIC_ATTENTION),
    "isa": cpu_library.INSTRUCTION_SETS,
    "pages": ("huge", "normal"),
}


def parse(text: str) -> dict[str, str]:
    """The choices that the environment variable states.

    Raises:
        ValueError: for an unknown operation or backend, naming the variable.
    """
    choices = {"experts": "auto", "linear": "auto", "attention": "auto", "pages": "huge"}
    for item in filter(None, (part.strip() for part in text.split(","))):
        operation, equals, name = (part.strip() for part in item.partition("="))
        if not equals or operation not in ("experts", *CHOICES):
            operations = ", ".join(f"{each}=..." for each in ("experts", *CHOICES))
            raise ValueError(f"{VARIABLE}: {item!r} is not one of {operations}")
        if operation in CHOICES and name not in CHOICES[operation]:
            raise ValueError(f"{VARIABLE}: {operation} is one of {', '.join(CHOICES[operation])}, not {name!r}")
        choices[operation] = name
    return choices


chosen = parse(os.environ.get(VARIABLE, ""))
# Grows with every change of the choices: what was decided before is decided anew
epoch = 0
if "isa" in chosen and cpu_library.unavailable is None:
    try:
        cpu_library.instruction_set(chosen["isa"])
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


@contextlib.contextmanager
def use(**choices: str) -> Iterator[None]:
    """Replaces choices within a block, as `use(linear="torch", attention="torch")`; for comparisons.

    Raises:
        ValueError: for an unknown operation or backend.
    """
    for operation, name in choices.items():
        if operation not in ("linear", "attention"):
            raise ValueError(f"{operation}={name!r} is not a choice: linear and attention are what may be chosen")
        if name not in CHOICES[operation]:
            raise ValueError(f"{operation}={name!r} is not a choice: it is one of {', '.join(CHOICES[operation])}")
    global epoch
    before = dict(chosen)
    chosen.update(choices)
    epoch += 1
    try:
        yield
    finally:
        chosen.update(before)
        epoch += 1


# What the whole numbers of quantised weights are stored in: of 8 bits, and two of 4 bits in one
QUANTIZED = (torch.int8, torch.uint8)


def cpu_refusal(operation: str, x: torch.Tensor, *weights: torch.Tensor) -> str | None:
    """The reason why the compiled CPU backend does not take a call, or None where it does.

    Where it was chosen by name, the reason is also given as a warning, once.

    Args:
        operation: "linear", "attention" or "experts".
        x: activations. weights: of their dtype, or quantised; a cache's tensors count as weights.
    """
    # Experts are chosen by the model's configuration, which the environment has a say in when the model is made
    choice = "auto" if operation == "experts" else chosen[operation]
    if choice not in ("auto", "cpu", *PUBLIC_ATTENTION):
        return f"{operation} is served by {choice!r}, as chosen"
    reason = _cpu_refusal(x, *weights)
    if reason is not None and choice == "cpu" and not torch.compiler.is_compiling():
        logger.warning_once(f"The compiled CPU backend does not serve {operation}: it {reason}.")
    return reason


def mask_refusal(mask: object) -> str | None:
    """The reason why the CPU's own attention does not take a mask, or None where it does."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        return "takes masks of (B, 1, Q, S)"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"takes boolean and additive masks, not {mask.dtype}"
    return "has no gradients of masks" if mask.requires_grad and torch.is_grad_enabled() else None


# Classes whose weights may be used without calling them, each with its kind, and classes beside what their `forward`
# is: where somebody has put another in its place, that is called
PLAIN_CLASSES: dict[type, tuple[str, tuple[tuple[Any, Any], ...]]] = {}


def register_plain(kind: str, *classes: type) -> None:
    """Says that the first of some classes, itself and no subclass, computes what its kind says, as it is now.

    Args:
        kind: "linear", "embedding", "norm", "mlp", "experts" or "activation".
        classes: that class, and those whose `forward` it stands for, such as native's.
    """
    PLAIN_CLASSES[classes[0]] = (kind, tuple((each, each.forward) for each in classes))  # type: ignore[attr-defined]


register_plain("linear", torch.nn.Linear)
register_plain("embedding", torch.nn.Embedding)
register_plain("activation", torch.nn.SiLU)
register_plain("activation", SiLUActivation)


@torch.compiler.assume_constant_result
def is_plain(kind: type, name: str) -> bool:
    """Whether a class is one of the plain ones of a kind, and nobody has replaced its `forward`.

    A constant to `torch.compile`, which does not look into a class where any dictionary has been changed before.
    """
    found = PLAIN_CLASSES.get(kind)
    return found is not None and found[0] == name and has_own_forward(kind)


def has_own_forward(kind: type) -> bool:
    """Whether a class, and those it stands for, have the `forward` that they had when they were registered."""
    return all(each.forward is forward for each, forward in PLAIN_CLASSES.get(kind, ("", ()))[1])


def bypass_refusal(name: str, module: torch.nn.Module) -> str | None:
    """The reason why a module's weights may not be used without calling it, or None where they may."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which only its own call runs"
    if "forward" in module.__dict__:
        return f"{name}'s forward was replaced, by accelerate's hooks for instance"
    if _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
        return "hooks are on every module"
    if _modules._global_backward_hooks or _modules._global_backward_pre_hooks:
        return "hooks are on every module"
    return None


def switched_off(module: torch.nn.Module) -> torch.nn.Module:
    """The layer within one of PEFT's whose adapters are switched off, which then only calls it; any other as it is.

    So that a model whose adapters are off computes, to the last bit, what it did without them: the same backend serves
    it. PEFT's layers have the weight and the bias of the layer within.
    """
    inner: Any = module
    while getattr(inner, "_disable_adapters", False) and type(inner).__module__.startswith("peft."):
        within = "original_module" if type(inner).__name__ == "ModulesToSaveWrapper" else "base_layer"
        if getattr(inner, "merged", False) or bypass_refusal("adapter", inner) is not None:
            break  # PEFT takes what was merged out of the weights before it calls the layer
        if within not in inner._modules:
            break
        inner = inner._modules[within]
    return inner


def plain_refusal(name: str, module: Any, kind: str) -> str | None:
    """The reason why a module is not known to compute what its class says, or None where its weights may be used.

    Args:
        kind: of plain classes, one of which it has to be, itself and no subclass, which may compute something else.
    """
    if not is_plain(type(module), kind):
        if type(inner := switched_off(module)) is torch.nn.Linear and is_plain(type(inner), kind):
            return bypass_refusal(name, inner)
        if type(module) in PLAIN_CLASSES and PLAIN_CLASSES[type(module)][0] == kind:
            return f"takes plain layers, the forward of {type(module).__name__} was replaced"
        return f"takes plain layers, {name} is a {type(module).__module__}.{type(module).__qualname__}"
    return bypass_refusal(name, module)


# Modes that need not see what a layer is made of: one that says where new tensors are made, which
# `torch.set_default_device` leaves on, and one for shapes without values
TRANSPARENT_MODES: set[type] = {DeviceContext, FakeTensorMode}


def _mode_refusal() -> str | None:
    modes = [torch._C._get_dispatch_stack_at(depth) for depth in range(torch._C._len_torch_dispatch_stack())]
    modes += [torch._C._get_function_stack_at(depth) for depth in range(torch._C._len_torch_function_stack())]
    for mode in modes:
        if type(mode) not in TRANSPARENT_MODES:
            return f"is left out where a {type(mode).__name__} sees every operator"
    return None


# Functions of PyTorch that other programs replace by their own, which native's layers then call: SageAttention,
# DeepSpeed's ZeRO-3, counters of operations
LINEAR, ATTENTION, SILU, SOFTMAX = F.linear, F.scaled_dot_product_attention, F.silu, F.softmax
MATMUL, CALL = torch.matmul, torch.nn.Module.__call__


def call_refusal() -> str | None:
    """The reason why calls are left to PyTorch's own operators just now, whatever their arguments; None where not.

    Something looks at every operator or module, transforms them, or writes down a program that has to open elsewhere.
    """
    # Every call of every layer comes through here: in decoding, microseconds count
    if torch.compiler.is_compiling():
        return "is left out of exported programs, which open without it" if torch.compiler.is_exporting() else None
    if torch._C._are_functorch_transforms_active():
        return "has no rules for torch.func"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        if (reason := _mode_refusal()) is not None:
            return reason
    if torch._C._get_tracing_state() is not None:
        return "is left out of traced programs, which open without it"
    if forward_ad._current_level >= 0:
        return "has no forward-mode derivatives"
    if F.linear is not LINEAR or F.scaled_dot_product_attention is not ATTENTION or F.silu is not SILU:
        return "is left out where functions of PyTorch were replaced"
    if F.softmax is not SOFTMAX or torch.matmul is not MATMUL or torch.nn.Module.__call__ is not CALL:
        return "is left out where functions of PyTorch were replaced"
    return None


def is_undisturbed(x: torch.Tensor) -> bool:
    """Whether nothing looks at operators or modules just now, and no gradient is needed of what is computed of `x`.

    Then what was decided of a module's calls holds. `call_refusal` says why calls are left to PyTorch, where they are.
    """
    C = torch._C
    return not (
        type(x) is not torch.Tensor
        or x.is_meta
        or torch.is_grad_enabled()
        or C._len_torch_dispatch_stack()
        or C._len_torch_function_stack()
        or C._are_functorch_transforms_active()
        or C._get_tracing_state() is not None
        or C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
        or _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
        or F.linear is not LINEAR
        or F.scaled_dot_product_attention is not ATTENTION
        or F.silu is not SILU
        or F.softmax is not SOFTMAX
        or torch.matmul is not MATMUL
        or torch.nn.Module.__call__ is not CALL
    )


# `torch.compile` and `torch.export` trace with fake tensors, for which the operators have rules
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def _cpu_refusal(x: torch.Tensor, *weights: torch.Tensor) -> str | None:
    # Every call of every layer comes through here: in decoding, microseconds count
    if cpu_library.unavailable is not None:
        return cpu_library.unavailable
    if not x.is_cpu:
        return f"is for CPUs, not {x.device.type}"
    dtype = x.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        return f"takes bf16 and fp32, not {dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "does not follow autocast"
    if (reason := call_refusal()) is not None:
        return reason
    if torch.is_grad_enabled():
        # Whatever needs some just now: a model is to compute the same, bit for bit, when its weights have been frozen
        return "has no gradients"
    if type(x) not in PLAIN:
        return f"takes plain tensors, not {type(x).__name__}"
    for weight in weights:
        if type(weight) not in PLAIN:
            return f"takes plain tensors, not {type(weight).__name__}"
        if weight.dtype is not dtype and weight.dtype not in QUANTIZED:
            return f"takes weights and caches of the activations' dtype ({dtype}), not {weight.dtype}"
        if not weight.is_cpu:
            return f"needs weights in the CPU's memory, not on {weight.device.type}"
    return None
