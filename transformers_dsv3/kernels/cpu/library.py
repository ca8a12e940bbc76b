"""The compiled library for CPUs: loading it, and what can be asked of it as a whole.

It is plain C without Python or torch inside (sources in `kernels/csrc`), built when the package is installed if there
is a C compiler, and called through ctypes, so that one binary serves every version of Python and torch. The threads it
works with are those of torch's own OpenMP pool.
"""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import torch


FOLDER = Path(__file__).parents[1]
# Names a folder with another build of the library, such as one with a sanitizer
FOLDER_VARIABLE = "TRANSFORMERS_DSV3_CPU_LIBRARY"
# The build writes into this file why there is no library; see setup.py
BUILD_FAILURE = "_cpu_build_failure.txt"
VERSION = 9  # dsv3_version() of csrc/library.c
# Tables of inner loops that csrc/library.c may have, best ones of a processor first; each machine runs some of them
INSTRUCTION_SETS = ("amx", "avx512", "avx_vnni", "avx2", "neon_dot", "neon", "portable")

pointer, integer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# What `csrc/dsv3.h` declares, which a test compares with this
SIGNATURES = {
    # x, x_type, ldx, w, w_type, ldw, w_scale, bias, y, ldy, M, N, K, int8_activations, threads
    "dsv3_linear": [pointer, whole, integer, pointer, whole, integer, *[pointer] * 3, *[integer] * 4, whole, whole],
    # w, w_type, w_scale, N, K, type, y, threads
    "dsv3_dequantize": [pointer, whole, pointer, integer, integer, whole, pointer, whole],
    # x, type, T, D, w_type, gate_up, its scale, down, its scale, E, I, expert, weight, K, shared gate, up and down
    # each with its scale, S, out, int8_activations, threads
    "dsv3_mixture": [
        *[pointer, whole, integer, integer, whole, *[pointer] * 4, integer, integer, pointer, pointer, integer],
        *[*[pointer] * 6, integer, pointer, whole, whole],
    ],
    # q_nope, q_rope, latent, k_rope each with strides, w, type, mask, mask_is_bytes, mask strides, first_query, scale,
    # out, B, H, Q, S, N, P, R, V, threads
    "dsv3_attention_absorbed": [
        *[*[pointer] * 9, whole, pointer, whole, pointer, integer, real, pointer, *[integer] * 8, whole],
    ],
    # the same with kv in place of latent, without w and R
    "dsv3_attention_expanded": [
        *[*[pointer] * 8, whole, pointer, whole, pointer, integer, real, pointer, *[integer] * 7, whole],
    ],
    # x, w, type, bias, T, D, E, groups, top_groups, K, normalize, factor, logits, weight, expert, threads
    "dsv3_route": [
        *[pointer, pointer, whole, pointer, *[integer] * 6, whole, real, pointer, pointer, pointer, whole],
    ],
    # x, type, ldx, weight, eps, y, rows, n, threads
    "dsv3_rms_norm": [pointer, whole, integer, pointer, real, pointer, integer, integer, whole],
    # x and strides, cos, sin and strides, type, interleave, y and strides, B, H, Q, P, threads
    "dsv3_rotate": [*[pointer] * 5, whole, whole, pointer, pointer, *[integer] * 4, whole],
    # x, type, D, w_type, q_a with scale, bias, norm, eps, its rank, q_b with scale, kv_a with scale, bias, norm, eps,
    # cos, sin and strides, interleave, B, Q, H, N, P, R, q, latent, k_rope, int8_activations, threads
    "dsv3_project": [
        *[pointer, whole, integer, whole, *[pointer] * 4, real, integer, *[pointer] * 6, real, *[pointer] * 3, whole],
        *[*[integer] * 6, pointer, pointer, pointer, whole, whole],
    ],
    # cache, batch, layer, q_nope and strides, q_rope and strides, latent, k_rope, w, type, scale, out, H, N, P, R, V,
    # threads
    "dsv3_attention_cached": [pointer, pointer, integer, *[pointer] * 7, whole, real, pointer, *[integer] * 5, whole],
    # model, cache, batch, x, previous, hidden, logits, threads
    "dsv3_step": [*[pointer] * 7, whole],
    # scores, type, ld, rows, V, temperature, top_k, top_p, min_p, number, scratch, token, threads
    "dsv3_sample": [pointer, whole, integer, integer, integer, *[pointer] * 7, whole],
    "dsv3_sample_scratch": [integer],
    "dsv3_size_of": [ctypes.c_char_p],
    "dsv3_use_isa": [ctypes.c_char_p],
    "dsv3_use_pool": [pointer, pointer],
    "dsv3_read": [pointer, integer, whole],
}


class NotAvailable(Exception):
    """There is no compiled library, or it does not run here; the message says why."""


def load(folder: Path) -> ctypes.CDLL:
    """The library in a folder, sharing torch's threads and using the best instruction set this processor has.

    Raises:
        NotAvailable: with the reason.
    """
    files = sorted(folder.glob("_cpu*.so"))
    if not files:
        reason = "was not built when the package was installed"
        failure = folder / BUILD_FAILURE
        raise NotAvailable(f"{reason}: {failure.read_text(encoding='utf-8').strip()}" if failure.exists() else reason)
    try:
        library = ctypes.CDLL(str(files[0]))
        if library.dsv3_version() != VERSION:
            raise NotAvailable(f"{files[0].name} was built from another version of this package: install it again")
        for name, arguments in SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise NotAvailable(f"{files[0].name} does not load: {error}") from error
    library.dsv3_use_isa.restype = ctypes.c_char_p
    library.dsv3_size_of.restype = library.dsv3_sample_scratch.restype = ctypes.c_int64
    _share_threads(library)
    library.dsv3_use_isa(None)
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """Hands the library the entry points of the OpenMP that torch has loaded; without them it uses one thread."""
    loaded = ctypes.CDLL(None)
    try:
        parallel, team_size = loaded.GOMP_parallel, loaded.omp_get_num_threads
    except AttributeError:
        return
    library.dsv3_use_pool(ctypes.cast(parallel, pointer), ctypes.cast(team_size, pointer))


class _Missing:
    """Stands where there is no library: whoever uses it is told why."""

    def __getattr__(self, name: str) -> Any:
        raise NotAvailable(f"the compiled CPU backend {unavailable}")


# The loaded library. Operators read it here at each call
loaded: Any = _Missing()
# Why there is no library here, None where there is
unavailable: str | None = None
try:
    loaded = load(Path(os.environ.get(FOLDER_VARIABLE, FOLDER)))
except NotAvailable as reason:
    unavailable = str(reason)


def instruction_set(name: str | None = None) -> str:
    """Chooses the instruction set, by default the best one this processor has.

    Args:
        name: of INSTRUCTION_SETS: "amx" (the next one with matrix units for bf16), "avx512" (with BF16 and VNNI),
            "avx_vnni" (AVX2 with VNNI), "avx2", "neon_dot" (with products of bytes), "neon" or "portable".

    Returns:
        The name of the one in use from now on.

    Raises:
        ValueError: if this processor does not run it, or there is no such one.
    """
    global in_use
    used = loaded.dsv3_use_isa(name and name.encode())
    if used is None:
        raise ValueError(f"this processor does not run {name!r} code; choose one of {', '.join(INSTRUCTION_SETS)}")
    in_use = used.decode()
    return in_use


# The instruction set in use, None where there is no library
in_use: str | None = None
if unavailable is None:
    instruction_set()


def has_tiles() -> bool:
    """Whether the library multiplies rows of bf16 on matrix units, however many they are."""
    return in_use == "amx"


def read_seconds(buffer: torch.Tensor) -> float:
    """Seconds that reading a contiguous CPU tensor from memory takes, with torch's number of threads."""
    words = buffer.numel() * buffer.element_size() // 8
    started = time.perf_counter()
    loaded.dsv3_read(buffer.data_ptr(), words, torch.get_num_threads())
    return time.perf_counter() - started
