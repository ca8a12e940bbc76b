"""How a call finds the implementation that serves it, by the table of `backends`.

Models ask `serve` at every call, `explain` prints the same table. What decides is asked in two parts. A backend's
`refusal` looks at what stays the same from call to call: types, hooks, dtypes, layouts, devices, choices. Where a call
needs no gradient and nothing looks at operators, as in decoding, what it found is kept, and asked again when any of
that has changed. Its `call_refusal` looks at the rest, such as the number of rows, at every call.

Any exception when a backend is first launched becomes its refusal, is logged once, and the next one takes the call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import selection
from .selection import logger


Refusal = Callable[..., str | None]


def always(*arguments: object) -> str | None:
    """The refusal of what takes every call."""
    return None


@dataclass
class Backend:
    """One implementation of one operation.

    Args:
        name: its name in Transformers' switches where it has one.
        does: what sets it apart, in a few words.
        module_refusal: takes the module that an operation belongs to; the reason why no call of it can be served, or
            None. `explain` prints it.
        function: computes the operation of its arguments. None where Transformers calls it, or where the module's own
            plain path is meant.
        refusal: takes the arguments of a call; the reason why calls of this kind are not served, or None.
        call_refusal: the reason why this very call is not served, or None; what `refusal` does not look at.
        undispatched: what `function` calls behind PyTorch's dispatcher, where nothing looks at operators.
        trains: whether it gives gradients. Others serve where none can be asked for, modules in training mode not at
            all.
        choice: what to set to have it; None where it cannot be chosen by itself.

    Attributes:
        failure: why it is not used any more, which is what happened when it was first launched.
        is_proven: whether it was launched.
    """

    name: str
    does: str
    module_refusal: Refusal = always
    function: Callable[..., Any] | None = None
    refusal: Refusal = always
    call_refusal: Refusal | None = None
    undispatched: Callable[..., Any] | None = None
    trains: bool = False
    choice: str | None = None
    failure: str | None = None
    is_proven: bool = False


class _Part(NamedTuple):
    """What a module that a decision rests on is like. Refers to no module and no tensor, so keeps no model alive."""

    parent: int  # place of the module that holds it among those before it
    name: str  # within its parent; "" for the operation's own module
    is_passed_over: bool  # whether its own call is, so that it must have no hooks
    kind: type
    forwards: tuple[tuple[Any, Any], ...]  # classes and what their forward is, where it is passed over
    parameters: tuple[tuple, ...]  # name, class, dtype, device, shape and stride of each


class _Decision(NamedTuple):
    """What was found for a module: the backends that its calls without gradients go to, while `parts` are as found."""

    dtype: torch.dtype
    device: torch.device
    training: bool
    epoch: int
    parts: tuple[_Part, ...]
    backends: tuple[Backend, ...]


@dataclass
class Operation:
    """What a model computes that more than one backend can serve.

    Args:
        name: as in the headings of `explain`'s page.
        backends: the first that takes a call serves it.
        parts: modules whose own call is passed over, by path within the operation's module; "" is that module.
        switch: the choice (`selection.chosen`) that leaves it to PyTorch, "linear" or "attention", if one does.
    """

    name: str
    backends: tuple[Backend, ...]
    parts: tuple[str, ...] = ()
    switch: str | None = None
    decisions: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)

    def __getitem__(self, name: str) -> Backend:
        return next(backend for backend in self.backends if backend.name == name)


def serve(operation: Operation, module: nn.Module, x: torch.Tensor, *arguments: Any) -> Any:
    """What the first backend that takes a call computes, or None where all of them leave it to the plain path.

    Args:
        operation: one of `backends`. module: the module whose operation it is.
        x, arguments: those of the backends' functions, activations first.
    """
    if torch.compiler.is_compiling():
        for backend in operation.backends:
            if refusal_of_call(operation, backend, module, x, *arguments) is None:
                return backend.function(x, *arguments)  # type: ignore[misc]
        return None
    if not selection.is_undisturbed(x):
        for backend in operation.backends:
            if refusal_of_call(operation, backend, module, x, *arguments) is None:
                result = launch(backend, backend.function, x, *arguments)
                if result is not None:
                    return result
        return None
    decision = operation.decisions.get(module)
    if (
        decision is None
        or decision.dtype is not x.dtype
        or decision.training is not module.training
        or decision.epoch != selection.epoch
        or decision.device != x.device
    ):
        return _decide(operation, module, x, *arguments)
    seen: list[Any] = []
    for parent, path, is_passed_over, kind, forwards, parameters in decision.parts:
        part = seen[parent]._modules.get(path) if path else module
        seen.append(part)
        if type(part) is not kind:
            return _decide(operation, module, x, *arguments)
        if part is None:
            continue
        state = part.__dict__
        if is_passed_over and (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return _decide(operation, module, x, *arguments)
        for owner, forward in forwards:
            if owner.forward is not forward:
                return _decide(operation, module, x, *arguments)
        held = state["_parameters"]
        for name, parameter_kind, dtype, device, shape, stride in parameters:
            weight = held.get(name)
            if type(weight) is not parameter_kind:
                return _decide(operation, module, x, *arguments)
            if weight is not None and (
                weight.dtype is not dtype
                or weight.device != device
                or weight.shape != shape
                or weight.stride() != stride
            ):
                return _decide(operation, module, x, *arguments)
    for backend in decision.backends:
        if backend.call_refusal is None or backend.call_refusal(x, *arguments) is None:
            function = backend.undispatched or backend.function
            if backend.is_proven:
                return function(x, *arguments)
            result = launch(backend, function, x, *arguments)
            if result is not None:
                return result
    return None


def refusal_of_call(
    operation: Operation, backend: Backend, module: nn.Module, x: torch.Tensor, *arguments: Any
) -> str | None:
    """The reason why a backend does not serve a call, or None where it does."""
    reason = standing_refusal(operation, backend, module, x, *arguments)
    if reason is None and backend.call_refusal is not None:
        reason = backend.call_refusal(x, *arguments)
    return reason


def standing_refusal(
    operation: Operation, backend: Backend, module: nn.Module, x: torch.Tensor, *arguments: Any
) -> str | None:
    """The part of `refusal_of_call` that stays as long as a decision holds."""
    if backend.function is None:
        return "is called by Transformers, or is the plain path"
    if backend.failure is not None:
        return backend.failure
    if not backend.trains and (module.training or torch.is_grad_enabled()):
        # Whatever needs some just now: a model is to compute the same, bit for bit, when its weights have been frozen
        return "has no gradients"
    if operation.switch is not None and selection.chosen[operation.switch] == "torch":
        return f"{operation.switch} is served by 'torch', as chosen"
    if "" in operation.parts and (reason := selection.bypass_refusal("layer", module)) is not None:
        return reason
    if not selection.has_own_forward(type(module)):
        return f"the forward of {type(module).__name__}, or of what it stands for, was replaced"
    return backend.refusal(x, *arguments)


def launch(backend: Backend, function: Callable[..., Any] | None, x: torch.Tensor, *arguments: Any) -> Any:
    """Calls a backend's function; an exception at its very first call becomes its refusal, and None is returned."""
    assert function is not None
    if backend.is_proven:
        return function(x, *arguments)
    try:
        result = function(x, *arguments)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # says nothing about the backend, and is what searches for the largest batch wait for
    except Exception as error:
        backend.failure = f"failed when it was first launched ({type(error).__name__}: {error})"
        selection.epoch += 1
        logger.warning_once(
            f"The backend {backend.name!r} ({backend.does}) {backend.failure}: others serve its calls."
        )
        return None
    backend.is_proven = True
    return result


def _decide(operation: Operation, module: nn.Module, x: torch.Tensor, *arguments: Any) -> Any:
    """Serves a call and keeps what was found, where later calls can tell that it still holds."""
    backends = tuple(b for b in operation.backends if standing_refusal(operation, b, module, x, *arguments) is None)
    parts = _describe(operation, module)
    if parts is not None:
        operation.decisions[module] = _Decision(x.dtype, x.device, module.training, selection.epoch, parts, backends)
    else:
        operation.decisions.pop(module, None)
    for backend in backends:
        if backend.call_refusal is None or backend.call_refusal(x, *arguments) is None:
            result = launch(backend, backend.undispatched or backend.function, x, *arguments)
            if result is not None:
                return result
    return None


def _describe(operation: Operation, module: nn.Module) -> tuple[_Part, ...] | None:
    """What a decision about a module rests on, or None where a later call could not tell whether it holds."""
    seen: dict[str, Any] = {"": module}
    found = [_part(0, "", "" in operation.parts, module)]
    for path in operation.parts:
        if not path:
            continue
        owner, _, name = path.rpartition(".")
        holder = seen[owner]
        part = None if holder is None else holder._modules.get(name)
        if part is None and holder is not None and holder.__dict__.get(name) is not None:
            return None  # a function in a module's place: another may stand there at the next call
        if part is not None and (
            type(part) not in selection.PLAIN_CLASSES or not selection.has_own_forward(type(part))
        ):
            return None  # an adapter, for one, whose state is its own
        if part is not None and selection.bypass_refusal(name, part) is not None:
            return None
        found.append(_part(list(seen).index(owner), name, True, part))
        seen[path] = part
    if any(part is None for part in found):
        return None
    if "" in operation.parts and selection.bypass_refusal("module", module) is not None:
        return None
    return tuple(part for part in found if part is not None)


def _part(parent: int, name: str, is_passed_over: bool, module: nn.Module | None) -> _Part | None:
    parameters = []
    for key, p in () if module is None else module._parameters.items():
        if p is not None and type(p) not in (torch.Tensor, nn.Parameter):
            return None  # another library's, which may change it between two calls
        parameters.append(
            (key, type(p), *((p.dtype, p.device, p.shape, p.stride()) if p is not None else (None,) * 4))
        )
    forwards = selection.PLAIN_CLASSES.get(type(module), ("", ()))[1]
    return _Part(parent, name, is_passed_over, type(module), forwards, tuple(parameters))
