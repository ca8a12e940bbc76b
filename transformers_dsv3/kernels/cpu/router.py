"""The router of a mixture of experts by the compiled CPU backend."""

import torch

from ..operators import define
from ..selection import cpu_refusal
from . import library
from .operators import (
    TYPES,
    addresses,
    out_of_memory,
    refuse_dtype,
    require_storage,
)


def route_refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: object) -> str | None:
    """The reason why `route` does not take a call, or None where it does."""
    if bias.dtype is not torch.float32:
        return f"takes a correction bias in fp32, not {bias.dtype}"
    if not weight.is_contiguous():
        return "takes a contiguous router weight"
    return cpu_refusal("linear", x, weight)


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    top_groups: int,
    top_k: int,
    normalize: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits `(T, E)`, mixing weights `(T, K)`, both fp32, and experts `(T, K)`, int64, of tokens `(T, D)`.

    Args:
        weight: `(E, D)` of x's dtype. bias: fp32 `(E,)`, added to the scores for the choice alone.
        groups, top_groups: experts are chosen within the best `top_groups` of so many groups.
        normalize: whether mixing weights are divided by their sum. factor: multiplies them.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("x", x)
    T, D = x.shape
    E = weight.shape[0]
    if weight.shape != (E, D) or weight.dtype is not x.dtype or not weight.is_contiguous():
        addresses(x, ("weight", weight, None, (E, D)))  # which says what is wrong
    if bias.dtype is not torch.float32 or bias.shape != (E,):
        raise ValueError(f"bias is not fp32 of ({E},)")
    if not (groups > 0 and E % groups == 0 and top_groups <= groups and top_k <= top_groups * (E // groups)):
        raise ValueError("groups do not fit")
    for tensor in (x, weight, bias):
        if (
            not tensor.is_contiguous()
            or (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > tensor.untyped_storage().nbytes()
        ):
            require_storage(x=x, weight=weight, bias=bias)
    x, bias = x.contiguous(), bias.contiguous()
    logits = x.new_empty((T, E), dtype=torch.float32)
    chosen_weight = x.new_empty((T, top_k), dtype=torch.float32)
    expert = x.new_empty((T, top_k), dtype=torch.int64)
    if library.loaded.dsv3_route(
        x.data_ptr(),
        weight.data_ptr(),
        TYPES[x.dtype],
        bias.data_ptr(),
        *(T, D, E, groups, top_groups, top_k),
        normalize,
        factor,
        logits.data_ptr(),
        chosen_weight.data_ptr(),
        expert.data_ptr(),
        torch.get_num_threads(),
    ):
        out_of_memory()
    return logits, chosen_weight, expert


def _fake(x, weight, bias, groups, top_groups, top_k, normalize, factor):  # type: ignore[no-untyped-def]
    shapes = (x.shape[0], weight.shape[0]), (x.shape[0], top_k)
    return (
        x.new_empty(shapes[0], dtype=torch.float32),
        x.new_empty(shapes[1], dtype=torch.float32),
        x.new_empty(shapes[1], dtype=torch.int64),
    )


operator = define(
    "route(Tensor x, Tensor weight, Tensor bias, int groups, int top_groups, int top_k, bool normalize, float factor) "
    "-> (Tensor, Tensor, Tensor)",
    route,
    _fake,
    "CPU",
)
