"""Huge pages for weights and caches: memory that is read whole at every token wants few entries in the TLB.

Linux gives them where it is asked (`madvise`), which is the default of Debian and Ubuntu, or everywhere (`always`).
Tensors stay PyTorch's own: only the pages that its allocator got for them, and has not touched, are asked for as huge.
"""

import bisect
import ctypes
import functools
import mmap
import re
from pathlib import Path

import torch
from torch import nn

from .selection import chosen


MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Smaller tensors are left where they are: a huge page of x86-64, and of ARM with pages of 4 KiB
FEWEST_BYTES = 2**21


def refusal() -> str | None:
    """The reason why no huge pages are asked for, or None."""
    return "normal pages were chosen" if chosen["pages"] == "normal" else _system_refusal()


@functools.cache
def _system_refusal() -> str | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has no madvise for huge pages"
    try:
        mode = MODE.read_text()
    except OSError:
        return f"this system has no {MODE}"
    return f"they are switched off here ({MODE} says never)" if "[never]" in mode else None


@functools.cache
def _madvise():  # type: ignore[no-untyped-def]
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks for huge pages for the memory of a new tensor that nothing was written to, and returns it.

    Where there are none, where it is small or not on the CPU, nothing happens. It is advice: the kernel decides when
    the pages are first written to.
    """
    if tensor.is_cpu and tensor.nbytes >= FEWEST_BYTES and refusal() is None:
        # Of the pages at both ends other tensors may have a part, to which it does no harm
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_HUGEPAGE)
    return tensor


def bytes_in_huge_pages(model: nn.Module) -> tuple[int, int]:
    """How many bytes of a model's weights in the CPU's memory lie in huge pages, and how many there are.

    Of a mapping that weights share with other tensors, a proportionate part is counted. (0, all) where the kernel
    tells nothing.
    """
    weights = sorted({(p.data_ptr(), p.nbytes) for p in model.parameters() if p.is_cpu and p.nbytes})
    huge = 0.0
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        text = ""
    starts = [start for start, _ in weights]
    for first, last, rest in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (.*?)^VmFlags", text, re.MULTILINE | re.DOTALL):
        begin, end = int(first, 16), int(last, 16)
        at = max(bisect.bisect_right(starts, begin) - 1, 0)
        inside = 0
        while at < len(weights) and starts[at] < end:
            inside += max(0, min(end, starts[at] + weights[at][1]) - max(begin, starts[at]))
            at += 1
        found = re.search(r"AnonHugePages: +(\d+) kB", rest)
        if inside and found:
            huge += min(inside, int(found[1]) * 1024 * inside / (end - begin))
    return round(huge), sum(size for _, size in weights)
