"""The next token of rows of scores by the compiled CPU backend, without a sort of the vocabulary."""

import ctypes
from collections.abc import Sequence

import torch

from . import library
from .operators import TYPES, refuse_dtype, require_storage


def sample_refusal(scores: torch.Tensor) -> str | None:
    """The reason why `sample` does not take scores, or None where it does."""
    if library.unavailable is not None:
        return library.unavailable
    if not scores.is_cpu:
        return f"is for CPUs, not {scores.device.type}"
    if scores.dtype is not torch.float32 and scores.dtype is not torch.bfloat16:
        return f"takes fp32 and bf16, not {scores.dtype}"
    return None if scores.shape[1] < 2**31 else "takes fewer than 2^31 words"


def sample(
    scores_WV: torch.Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    number: Sequence[float],
) -> list[int]:
    """The next token of each row, by its own settings and number, as Transformers' warpers in `generate`'s order.

    Args:
        scores_WV: fp32 or bf16 `(W, V)`, not changed.
        temperature: 0 for the most likely token, the first of several. top_k: 0 for all. top_p: 1 for all. min_p: 0
            for all. number: in [0, 1), which decides the draw.

    Returns:
        Token ids, -1 for rows that have NaN, plus infinity, or minus infinity alone.

    Raises:
        ValueError: for another dtype, no words, settings of another length or out of range, and freed storage.
    """
    if scores_WV.dtype not in (torch.float32, torch.bfloat16):
        refuse_dtype("scores", scores_WV)
    if scores_WV.dim() != 2 or not scores_WV.shape[1]:
        raise ValueError(f"scores is of shape {tuple(scores_WV.shape)}, not (rows, words)")
    W, V = scores_WV.shape
    for name, values, least, most in (
        ("temperature", temperature, 0.0, float("inf")),
        ("top_k", top_k, 0, 2**62),
        ("top_p", top_p, 0.0, float("inf")),
        ("min_p", min_p, 0.0, 1.0),
        ("number", number, 0.0, 1.0),
    ):
        if len(values) != W:
            raise ValueError(f"{name} has {len(values)} values for {W} rows")
        for value in values:
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, not from {least} to {most}")
    require_storage(scores=scores_WV)
    if scores_WV.stride(1) != 1:
        scores_WV = scores_WV.contiguous()
    threads = max(1, min(torch.get_num_threads(), W))
    scratch = torch.empty(threads, library.loaded.dsv3_sample_scratch(V), dtype=torch.float32, device="cpu")
    token = torch.empty(W, dtype=torch.int64, device="cpu")
    library.loaded.dsv3_sample(
        scores_WV.data_ptr(),
        TYPES[scores_WV.dtype],
        scores_WV.stride(0),
        *(W, V),
        (ctypes.c_float * W)(*temperature),
        (ctypes.c_int64 * W)(*top_k),
        (ctypes.c_double * W)(*top_p),
        (ctypes.c_float * W)(*min_p),
        (ctypes.c_double * W)(*number),
        scratch.data_ptr(),
        token.data_ptr(),
        threads,
    )
    return token.tolist()
