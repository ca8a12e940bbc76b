"""What this machine can do at best, measured by the same threads in the same minutes as what is compared with it.

On a GPU it is the memory and the matrix units of that: copies and sums of a buffer many times as large as its caches,
and large products of random numbers (zeros multiply faster).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.cpu import library as cpu_library
from ..kernels.cpu.linear import linear
from ..kernels.cpu.operators import GROUP
from ..kernels.matmul_cpu import matmul, uses_onednn
from .devices import Device


# M, N, K. Rows whose distance is a power of two crowd a few places of the caches, so N is none: with 2048 PyTorch may
# reach half of the rate.
GEMM_SHAPE = (2048, 2816, 2048)
READ_BYTES = 2**30
TRIES = 3
# On a GPU a product has to fill all of its multiprocessors, and a try to last longer than its clocks take to rise
GPU_GEMM_SHAPE = (8192, 8192, 8192)
GPU_CALLS = 10


def read_by_sums(buffer: torch.Tensor) -> float:
    """Seconds that torch's threads take to read a buffer once from one end to the other.

    Args:
        buffer: contiguous fp32, a multiple of 65,536 elements, much larger than the last cache.
    """
    # Of torch's reductions and products, sums of long rows read fastest
    rows = buffer.view(-1, 65536)
    started = time.perf_counter()
    rows.sum(dim=1)
    return time.perf_counter() - started


def ways_to_read() -> dict[str, Callable[[torch.Tensor], float]]:
    """What there is here to read a buffer with: functions from a buffer to seconds, by name."""
    ways: dict[str, Callable[[torch.Tensor], float]] = {"sums of rows by torch": read_by_sums}
    if cpu_library.unavailable is None:
        ways["the compiled library"] = cpu_library.read_seconds
    return ways


def ways_to_multiply(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    """What there is here for the product of `(M, K)` and `(N, K)` of one dtype, by name; int8 is summed in int32."""
    if dtype != torch.int8:
        floating: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
            "linear layers by torch": torch.nn.functional.linear
        }
        if uses_onednn(torch.empty(0, dtype=dtype)):
            floating["oneDNN"] = lambda a, b: matmul(a, b.t())
        return floating
    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
        "integer products by torch": lambda a, b: torch._int_mm(a, b.t())
    }
    if cpu_library.unavailable is None:
        scales = torch.ones(GEMM_SHAPE[1], GEMM_SHAPE[2] // GROUP, dtype=torch.float16)
        ways["the compiled library"] = lambda a, b: linear(a.to(torch.bfloat16), b, scales, None, True)
    return ways


def gpu_ways_to_read(device: Device) -> dict[str, Callable[[torch.Tensor], float]]:
    """The same for a buffer in a GPU's memory: functions from a buffer to seconds for as many bytes as it has."""

    def by_copies(buffer: torch.Tensor) -> float:
        target = torch.empty_like(buffer)
        seconds, _ = device.timed(lambda: [target.copy_(buffer) for _ in range(GPU_CALLS)])
        return seconds / (2 * GPU_CALLS)  # each moves as many bytes out as in

    def by_sums(buffer: torch.Tensor) -> float:
        rows = buffer.view(-1, 65536)
        seconds, _ = device.timed(lambda: [rows.sum(dim=1) for _ in range(GPU_CALLS)])
        return seconds / GPU_CALLS

    return {"copies, bytes read and written": by_copies, "sums of rows by torch": by_sums}


def gpu_way_to_multiply(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """What torch has on a GPU for the product of `(M, K)` and `(N, K)`."""
    return (lambda a, b: torch._int_mm(a, b.t())) if dtype == torch.int8 else torch.nn.functional.linear


def gemm_seconds(multiply: Callable[[torch.Tensor, torch.Tensor], Any], a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one product."""
    started = time.perf_counter()
    multiply(a, b)
    return time.perf_counter() - started


class Ceilings:
    """Read bandwidth and GEMM rates, measured once for every call of `measure`.

    Args:
        dtypes: of the GEMMs: torch.float32, torch.bfloat16, torch.int8.
        device: whose ceilings.
    """

    def __init__(self, dtypes: list[torch.dtype], device: Device | None = None):
        self.device = device if device is not None else Device()
        # Written, so that every page is really there
        self.buffer = torch.ones(READ_BYTES // 4, device=self.device.torch)
        generator = torch.Generator(self.device.torch).manual_seed(0)
        shape = GPU_GEMM_SHAPE if self.device.is_gpu else GEMM_SHAPE
        self.matrices = {}
        for dtype in dtypes:
            a, b = (torch.randn(rows, shape[2], generator=generator, device=self.device.torch) for rows in shape[:2])
            if dtype == torch.int8:
                a, b = (x.mul(40).clamp(-127, 127) for x in (a, b))
            self.matrices[dtype] = (a.to(dtype), b.to(dtype))
        self.operations = 2 * math.prod(shape)
        # The ceiling is what the fastest of them reaches, tried here once for the run
        ways = gpu_ways_to_read(self.device) if self.device.is_gpu else ways_to_read()
        for read in ways.values():
            read(self.buffer)
        tried = {name: min(read(self.buffer) for _ in range(TRIES)) for name, read in ways.items()}
        self.read_by = min(tried, key=lambda name: tried[name])
        self.read_seconds = ways[self.read_by]
        self.read: list[float] = []
        self.gemm: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        self.measure()
        self.start()

    def start(self) -> None:
        """Forgets what was measured before, which was for another workload."""
        self.read.clear()
        for rates in self.gemm.values():
            rates.clear()

    def measure(self) -> None:
        """Adds bytes a second and operations a second to the lists, each the best of a few: ceilings, not averages."""
        self.read.append(self.buffer.nbytes / min(self.read_seconds(self.buffer) for _ in range(TRIES)))
        for dtype, (a, b) in self.matrices.items():
            self.gemm[dtype].append(self.operations / self._fastest_product(dtype, a, b))

    def _fastest_product(self, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> float:
        """Seconds of the fastest way to multiply two matrices."""
        if not self.device.is_gpu:
            ways = ways_to_multiply(dtype).values()
            return min(gemm_seconds(multiply, a, b) for multiply in ways for _ in range(TRIES))
        multiply = gpu_way_to_multiply(dtype)
        multiply(a, b)
        tried = (self.device.timed(lambda: [multiply(a, b) for _ in range(GPU_CALLS)])[0] for _ in range(TRIES))
        return min(tried) / GPU_CALLS

    def bandwidth(self) -> float:
        """Median bytes a second since `start`."""
        return statistics.median(self.read)

    def rate(self, dtype: torch.dtype) -> float:
        """Median operations a second of products of this dtype since `start`."""
        return statistics.median(self.gemm[dtype])

    def record(self) -> dict[str, Any]:
        """What was measured since `start`, for the JSON file."""
        return {
            "read_by": self.read_by,
            "read_bytes_per_second": list(self.read),
            "gemm_operations_per_second": {
                str(dtype).removeprefix("torch."): list(rates) for dtype, rates in self.gemm.items()
            },
        }
