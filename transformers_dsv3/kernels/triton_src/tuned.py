"""Tile sizes of the GPU programs by family of devices, and the shapes that they are compiled ahead of time for.

A program's tiles come from this table and never from trials at first use, which take minutes for a model. They were
chosen by what the compilers report: matrix instructions of the largest kind, no spilled registers, shared memory that
fits. None was timed on a device.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """Devices that share one row of the table.

    Args:
        backend, arch, warp_size: Triton's target that stands for the family.
        shared: bytes of shared memory (AMD: LDS) that one program may have.
        devices: examples, for people.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared: int
    devices: str


FAMILIES = {
    "sm80": Family("cuda", 80, 32, 163 * 1024, "A100, A800"),
    "sm89": Family("cuda", 89, 32, 99 * 1024, "RTX 4090, L40S; RTX 3090 and A6000; RTX 5090"),
    "sm90": Family("cuda", 90, 32, 227 * 1024, "H100, H200, H800, H20"),
    "gfx90a": Family("hip", "gfx90a", 64, 64 * 1024, "MI210, MI250"),
    "gfx942": Family("hip", "gfx942", 64, 64 * 1024, "MI300, MI325"),
    # Fits every device above
    "default": Family("cuda", 80, 32, 64 * 1024, "all others"),
}


@dataclass(frozen=True)
class Specimen:
    """One way in which a program is compiled in use.

    Args:
        label: program, shape and dtype, for people.
        kernel: the `@triton.jit` function.
        signature: from every argument that is no constant to its type, such as "*bf16" or "i32"; ":16" behind it for
            a pointer or number that is a multiple of 16, which Triton finds out at launch.
        constexprs: from every `tl.constexpr` argument to its value.
        options: of the compiler, such as `num_warps` and `num_stages`.
        matrix: whether the program has products for the matrix units.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    options: Mapping[str, int] = field(default_factory=dict)
    matrix: bool = False


def _product(m: int, n: int, r: int, warps: int, stages: int, group: int = 8) -> dict[str, int]:
    """Constants of the experts' products: rows and columns of a tile, how much of the sum at a time, and the order."""
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": r, "GROUP": group}
    return {**tile, "num_warps": warps, "num_stages": stages}


# From an operation and a family to the constants and the compiler's options of its program; a family that is missing
# takes "default".
TILES: dict[str, dict[str, dict[str, int]]] = {
    # By rows that are asked for, of which one program takes BLOCK_M; RESIDENT: programs that a processor has at a time
    "mla_decode/16": {
        "sm80": {"BLOCK_M": 16, "BLOCK_S": 32, "num_warps": 4, "num_stages": 4, "RESIDENT": 1},
        "sm89": {"BLOCK_M": 16, "BLOCK_S": 32, "num_warps": 4, "num_stages": 3, "RESIDENT": 1},
        "sm90": {"BLOCK_M": 16, "BLOCK_S": 32, "num_warps": 4, "num_stages": 3, "RESIDENT": 2},
        "gfx90a": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "gfx942": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "default": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
    },
    "mla_decode/32": {
        "sm80": {"BLOCK_M": 32, "BLOCK_S": 32, "num_warps": 8, "num_stages": 3, "RESIDENT": 1},
        "sm89": {"BLOCK_M": 32, "BLOCK_S": 32, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
        "sm90": {"BLOCK_M": 32, "BLOCK_S": 32, "num_warps": 8, "num_stages": 3, "RESIDENT": 1},
        "gfx90a": {"BLOCK_M": 32, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "gfx942": {"BLOCK_M": 32, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "default": {"BLOCK_M": 32, "BLOCK_S": 16, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
    },
    "mla_decode/64": {
        "sm80": {"BLOCK_M": 64, "BLOCK_S": 16, "num_warps": 8, "num_stages": 3, "RESIDENT": 1},
        "sm89": {"BLOCK_M": 64, "BLOCK_S": 16, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
        "sm90": {"BLOCK_M": 64, "BLOCK_S": 16, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
        "gfx90a": {"BLOCK_M": 64, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "gfx942": {"BLOCK_M": 64, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2, "RESIDENT": 1},
        "default": {"BLOCK_M": 32, "BLOCK_S": 16, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
    },
    "mla_decode/fp32": {
        "gfx90a": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 4, "num_stages": 1, "RESIDENT": 1},
        "gfx942": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 4, "num_stages": 1, "RESIDENT": 1},
        "default": {"BLOCK_M": 16, "BLOCK_S": 16, "num_warps": 8, "num_stages": 2, "RESIDENT": 1},
    },
    "experts_sort_few": {"default": {"BLOCK": 128, "OTHERS": 32, "num_warps": 4}},
    "experts_sort_chunk": {"default": {"BLOCK": 256, "OTHERS": 16, "num_warps": 8}},
    # BLOCK_N gates and as many ups
    "experts_gate_up/16": {
        "sm80": _product(16, 32, 128, 4, 5),
        "sm89": _product(16, 32, 128, 4, 4),
        "sm90": _product(16, 32, 128, 4, 5),
        "default": _product(16, 32, 64, 4, 3),
    },
    "experts_gate_up/32": {
        "sm80": _product(32, 32, 64, 4, 5),
        "sm89": _product(32, 32, 64, 4, 5),
        "sm90": _product(32, 32, 128, 4, 4),
        "default": _product(32, 32, 64, 4, 3),
    },
    "experts_gate_up/64": {
        "sm80": _product(64, 64, 64, 4, 4),
        "sm89": _product(64, 64, 32, 4, 4),
        "sm90": _product(64, 64, 64, 4, 4),
        "gfx90a": _product(64, 64, 64, 4, 2),
        "gfx942": _product(64, 64, 64, 4, 2),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_gate_up/128": {
        "sm80": _product(128, 128, 32, 8, 4),
        "sm89": _product(128, 64, 32, 8, 4),
        "sm90": _product(128, 128, 64, 8, 4),
        "gfx90a": _product(128, 64, 64, 8, 2),
        "gfx942": _product(128, 128, 64, 8, 2),
        "default": _product(128, 64, 32, 8, 3),
    },
    "experts_gate_up/fp32": {"default": _product(64, 32, 16, 4, 2)},
    "experts_gate_up/tf32": {
        "sm80": _product(128, 64, 32, 8, 3),
        "sm90": _product(128, 64, 32, 8, 4),
        "default": _product(64, 32, 32, 4, 3),
    },
    "experts_gate_up/rounded": {
        "sm80": _product(128, 64, 32, 8, 3),
        "sm90": _product(128, 64, 64, 8, 3),
        "default": _product(64, 64, 32, 4, 2),
    },
    "experts_product/16": {
        "sm80": _product(16, 32, 128, 4, 5),
        "sm89": _product(16, 32, 128, 4, 4),
        "sm90": _product(16, 32, 128, 4, 5),
        "default": _product(16, 32, 128, 4, 3),
    },
    "experts_product/32": {
        "sm80": _product(32, 64, 128, 4, 4),
        "sm89": _product(32, 64, 128, 4, 4),
        "sm90": _product(32, 64, 128, 4, 4),
        "default": _product(32, 64, 64, 4, 3),
    },
    "experts_product/64": {
        "sm80": _product(64, 128, 64, 4, 4),
        "sm89": _product(64, 128, 32, 4, 4),
        "sm90": _product(64, 128, 64, 4, 4),
        "gfx90a": _product(64, 128, 64, 4, 2),
        "gfx942": _product(64, 128, 64, 4, 2),
        "default": _product(64, 128, 32, 4, 3),
    },
    "experts_product/128": {
        "sm80": _product(128, 256, 32, 8, 4),
        "sm89": _product(128, 128, 32, 8, 4),
        "sm90": _product(128, 256, 64, 8, 4),
        "gfx90a": _product(128, 128, 64, 8, 2),
        "gfx942": _product(128, 256, 64, 8, 2),
        "default": _product(128, 128, 32, 8, 3),
    },
    "experts_product/fp32": {"default": _product(64, 32, 16, 4, 2)},
    "experts_product/tf32": {
        "sm80": _product(128, 128, 32, 8, 3),
        "sm90": _product(128, 128, 32, 8, 4),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_product/rounded": {
        "sm80": _product(128, 128, 32, 8, 3),
        "sm90": _product(128, 128, 64, 8, 3),
        "default": _product(64, 128, 32, 4, 2),
    },
    "experts_activation_gradient/64": {
        "sm80": _product(64, 128, 64, 4, 3),
        "sm90": _product(64, 128, 64, 4, 4),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_activation_gradient/128": {
        "sm80": _product(128, 128, 32, 8, 4),
        "sm89": _product(128, 128, 32, 8, 4),
        "sm90": _product(128, 128, 64, 8, 4),
        "gfx90a": _product(128, 128, 64, 8, 2),
        "gfx942": _product(128, 128, 64, 8, 2),
        "default": _product(128, 64, 32, 8, 3),
    },
    "experts_activation_gradient/fp32": {"default": _product(64, 64, 16, 4, 2)},
    "experts_activation_gradient/tf32": {
        "sm80": _product(128, 128, 32, 8, 3),
        "sm90": _product(128, 128, 32, 8, 4),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_activation_gradient/rounded": {
        "sm80": _product(128, 128, 32, 8, 3),
        "sm90": _product(128, 128, 64, 8, 3),
        "default": _product(64, 64, 32, 4, 2),
    },
    # Here the sum is over an expert's pairs
    "experts_weight_gradient/half": {
        "sm80": _product(128, 128, 32, 8, 5),
        "sm89": _product(128, 128, 32, 8, 4),
        "sm90": _product(256, 128, 64, 8, 5),
        "gfx90a": _product(128, 128, 64, 8, 2),
        "gfx942": _product(128, 128, 64, 8, 2),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_weight_gradient/fp32": {"default": _product(64, 64, 16, 4, 2)},
    "experts_weight_gradient/tf32": {
        "sm80": _product(128, 128, 32, 8, 3),
        "sm90": _product(128, 128, 32, 8, 4),
        "default": _product(64, 64, 32, 4, 3),
    },
    "experts_sum": {"default": {"BLOCK_T": 8, "BLOCK_D": 256, "num_warps": 4}},
}


def tiles(operation: str, family: str) -> dict[str, int]:
    """Constants and compiler's options of an operation's program on a family of devices."""
    rows = TILES[operation]
    return rows.get(family, rows["default"])


@functools.cache
def family_of(device: torch.device) -> str:
    """The family of a device, "default" for one that the table does not know and for the CPU's interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return name if name in FAMILIES else "default"
    # By shared memory too: 8.6 and 12.x have the 99 KB of 8.9
    known = {(8, 0): "sm80", (8, 6): "sm89", (8, 9): "sm89", (9, 0): "sm90", (12, 0): "sm89"}
    return known.get((properties.major, properties.minor), "default")
