"""What the programs of the experts share: which tile a program computes, and reads with or without a mask.

A tile has pairs of one expert only, so that the last tile of an expert is ragged and none is padded further. How many
tiles there are is known on the device alone: programs are launched for as many as there can be, and those past the
last tile end at once. Numbers that change from call to call are not specialised on: no batch has a program compiled
anew, which a CUDA graph could not hold.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..triton_support import precision
from .tuned import FAMILIES, Specimen, family_of, tiles


# Layers that programs are compiled ahead of time for: K, E, D and I of Moonlight and of DeepSeek-V3
LAYERS = {"Moonlight": (6, 64, 2048, 1408), "V3": (8, 256, 7168, 2048)}


@triton.jit
def place_of(program, tiles, columns, GROUP: tl.constexpr):
    """Tile of rows and tile of columns of a program.

    Programs that run at the same time share rows and weights in the L2 cache: GROUP tiles of rows go together through
    all columns.
    """
    group = program // (GROUP * columns)
    within = program % (GROUP * columns)
    rows = tl.minimum(tiles - group * GROUP, GROUP)
    return group * GROUP + within % rows, within // rows


@triton.jit
def tile_of(tile, offsets, E: tl.constexpr, PAD_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile of rows, E for a tile past the last one; its first row and the end of the expert's rows."""
    e = tl.arange(0, PAD_E)
    start_E = tl.load(offsets + e, mask=e < E, other=0)
    end_E = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles_E = (end_E - start_E + BLOCK_M - 1) // BLOCK_M
    passed_E = (tl.cumsum(tiles_E, 0) <= tile) & (e < E)
    expert = tl.sum(passed_E.to(tl.int32), 0)
    within = tile - tl.sum(tl.where(passed_E, tiles_E, 0), 0)
    start = tl.sum(tl.where(e == expert, start_E, 0), 0) + within * BLOCK_M
    return expert, start, tl.sum(tl.where(e == expert, end_E, 0), 0)


@triton.jit
def read(pointers, mask, WHOLE: tl.constexpr):
    """What pointers point to, zero where the mask is False; WHOLE tells that it is True everywhere."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


def height_of(tokens: int, pairs: int, experts: int) -> int:
    """How many rows tiles have in a call.

    Up to 64 tokens a tile takes all pairs that an expert can have, so that its weights are read once. With more, tiles
    are the higher the more pairs experts have on average.
    """
    if tokens <= 64:
        return next(height for height in (16, 32, 64) if tokens <= height)
    return 64 if pairs <= 96 * experts else 128


def row_of(program: str, height: int, dtype: torch.dtype, weight: torch.Tensor) -> dict[str, int]:
    """The row of the table for a call.

    Args:
        program: "gate_up", "product" or "activation_gradient".
        height: see `height_of`; programs whose products are of fp32, or of fp32 weights that are rounded in registers
            (under autocast), have tiles of one height, those of INT8 weights of 64 rows at most.
        dtype: of the products. weight: the experts'.
    """
    kind = str(height)
    if dtype == torch.float32:
        kind = "fp32" if precision() == "ieee" else "tf32"
    elif weight.dtype == torch.float32:
        kind = "rounded"
    elif weight.dtype == torch.int8:
        kind = str(min(height, 64))  # higher ones have no registers left for the scales
    return tiles(f"experts_{program}/{kind}", family_of(weight.device))


def padded(experts: int) -> int:
    """Width of vectors of one number an expert, a power of 2."""
    return max(triton.next_power_of_2(experts), 16)


def most_tiles(pairs: int, experts: int, height: int) -> int:
    """How many tiles of so many rows there can be, each with pairs of one of the experts."""
    return (pairs + min(pairs, experts) * (height - 1)) // height


def specimen(
    label: str, kernel: Any, arguments: Mapping[str, object], row: Mapping[str, int], matrix: bool = True
) -> Specimen:
    """How a program is compiled.

    Args:
        arguments: from each argument to its type, as in a `Specimen`'s signature, or to its value if it is constant.
        row: of the table.
        matrix: as in a `Specimen`.
    """
    arguments = {**arguments, **{key: value for key, value in row.items() if key.isupper()}}
    types = {key: value for key, value in arguments.items() if str(value).startswith(("*", "i32"))}
    return Specimen(
        label,
        kernel,
        {key: str(value) for key, value in types.items()},
        {key: value for key, value in arguments.items() if key not in types},
        {key: value for key, value in row.items() if not key.isupper()},
        matrix,
    )


def kinds(family: str) -> dict[str, tuple[str, str]]:
    """Rows of the table that training takes, and for each the dtypes of activations and of weights."""
    found = {"64": ("bf16", "bf16"), "128": ("bf16", "bf16"), "rounded": ("bf16", "fp32"), "fp32": ("fp32", "fp32")}
    if FAMILIES[family].backend == "cuda":
        found["tf32"] = ("fp32", "fp32")
    return found


def precision_of(kind: str) -> str:
    """As `precision` gives it where a row of the table is taken."""
    return "tf32" if kind == "tf32" else "ieee"
