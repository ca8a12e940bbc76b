"""Gradients of weights apart from those of inputs, for pipelines whose schedules compute them at another time.

While a store is in use, the backward passes of linear layers and of experts give the gradients of their inputs alone,
and leave with it what remains to be computed. PyTorch's pipelines split the graph of autograd instead, which runs
custom functions twice and cannot have activation checkpointing.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .selection import bypass_refusal


class WeightGradients:
    """What remains to be computed of backward passes that have ended, in their order."""

    def __init__(self) -> None:
        self._left: list[Callable[[], list[tuple[nn.Parameter, torch.Tensor]]]] = []

    def put_off(self, compute: Callable[[], list[tuple[nn.Parameter, torch.Tensor]]]) -> None:
        """Leaves a computation here, which gives parameters and what is to be added to their gradients."""
        self._left.append(compute)

    def take(self) -> Callable[[], None]:
        """All that was left since the last time, as a function that computes it and adds it to the gradients."""
        left, self._left = self._left, []

        def run() -> None:
            with torch.no_grad():
                for compute in left:
                    for parameter, gradient in compute():
                        if parameter.grad is None:
                            parameter.grad = gradient
                        else:
                            parameter.grad += gradient
            left.clear()

        return run


_store: WeightGradients | None = None


@contextlib.contextmanager
def putting_off(store: WeightGradients | None) -> Iterator[None]:
    """Has forward passes, and those that are computed again in backward passes on any thread, use a store."""
    global _store
    before, _store = _store, store
    try:
        yield
    finally:
        _store = before


def store_for(*weights: torch.Tensor) -> WeightGradients | None:
    """The store in use, where all of the weights are parameters that are trained as a whole here."""
    if _store is None:
        return None
    return _store if all(type(weight) is nn.Parameter and weight.requires_grad for weight in weights) else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight_NK: nn.Parameter, bias_N: torch.Tensor | None, store: WeightGradients
    ) -> torch.Tensor:
        # The parameter itself: what is kept for the backward pass may be another tensor of the same numbers
        ctx.parameter, ctx.store = weight_NK, store
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        ctx.save_for_backward(x, weight_NK)
        return F.linear(x, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight_NK = ctx.saved_tensors
        parameter = ctx.parameter

        def compute() -> list[tuple[nn.Parameter, torch.Tensor]]:
            d_weight_NK = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)
            return [(parameter, d_weight_NK.to(parameter.dtype))]

        ctx.store.put_off(compute)
        d_x = (grad @ weight_NK.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        d_bias_N = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return d_x, None, d_bias_N, None


def call_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`; of a plain `nn.Linear` the gradient of the weight is put off, where there is a store.

    Autocast is followed as by PyTorch's own.
    """
    if _store is None or type(layer) is not nn.Linear or bypass_refusal("layer", layer) is not None:
        return layer(x)
    store = store_for(layer.weight)
    return layer(x) if store is None else _Linear.apply(x, layer.weight, layer.bias, store)
