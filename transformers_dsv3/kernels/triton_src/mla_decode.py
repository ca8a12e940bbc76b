"""Attention of a few queries over cached latents (arXiv 2405.04434, section 2.1.2, absorbed), in two programs.

The context of each sequence is divided among programs, since a batch of decoding has fewer sequences than a GPU has
processors: each attends to its part with an online softmax (arXiv 2205.14135) and leaves a normalised sum and the
logarithm of the softmax's denominator, from which the second program puts the whole together. Each latent is read
once for up to `BLOCK_M` rows, all heads of up to four queries where there are 16 heads, and serves as key and value.

Shape suffixes: M rows (heads times queries), S positions, R rank of the latent, P rotary dims, T parts of the context.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .tuned import FAMILIES, Specimen, family_of, tiles


LOG2_E = 1.4426950408889634
# Of the second program: parts of the context whose denominators it holds at once, and whose sums it adds at once
MOST_PARTS = 256
PARTS_AT_ONCE = 64
# Columns of a latent that one of the second programs puts together
COLUMNS = 64
# What starting a part costs, and merging one, in blocks of positions: estimates, nothing was timed
STARTING, MERGING = 2.0, 0.01
# What a mask does to scores
NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2

_NO_MASK, _ADDITIVE = tl.constexpr(NO_MASK), tl.constexpr(ADDITIVE)
_MOST_PARTS, _PARTS_AT_ONCE = tl.constexpr(MOST_PARTS), tl.constexpr(PARTS_AT_ONCE)
_LOG2_E = tl.constexpr(LOG2_E)


# Numbers that change from step to step are not specialised: a cache that grows would be compiled for again
@triton.jit(do_not_specialize=["S", "splits", "mask_b", "mask_q", "lengths_b", "pages_b"])
def decode_part(
    out,
    sums_out,
    logs_out,
    q_latent,
    q_rope,
    latent,
    k_rope,
    mask,
    lengths,
    pages,
    scale,
    lowest,
    H,
    S,
    splits,
    q_latent_b,
    q_latent_h,
    q_latent_q,
    q_rope_b,
    q_rope_h,
    q_rope_q,
    latent_b,
    latent_s,
    k_rope_b,
    k_rope_s,
    mask_b,
    mask_q,
    lengths_b,
    pages_b,
    out_b,
    out_h,
    out_q,
    QUERIES: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: blocks of rows, parts of the context, sequences.

    Args:
        out: `(B, H, Q, R)` by its strides, where contexts are one part. Else None, and written are `sums_out`
            `(B, T, H * Q, R)` and `logs_out` `(B, T, H * Q)`, fp32; an empty part has a logarithm of -inf and no sum.
        latent, k_rope: `(B, S, R)` and `(B, S, P)`; with `PAGE`, `(pages, PAGE, R)` and `(pages, PAGE, P)`, and
            `pages` `(B, ceil(S / PAGE))` tells which page holds which positions.
        mask: `(B or 1, Q or 1, S)` by its strides, bytes where `MASK` is boolean. At `lowest` and below, additive
            masks forbid.
        lengths: `(B,)` by its stride, or None: positions that count. Behind them nothing is read.
        scale: of the scores, times log2(e).
        CAUSAL: the queries are the last positions of their sequence, and see none that come after them.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    live_M, in_R, in_P = m < H * QUERIES, r < R, p < P
    h, q = m // QUERIES, m % QUERIES
    q_latent_MR = tl.load(
        q_latent + b * q_latent_b + (h * q_latent_h + q * q_latent_q)[:, None] + r[None, :],
        mask=live_M[:, None] & in_R[None, :],
        other=0.0,
    )
    q_rope_MP = tl.load(
        q_rope + b * q_rope_b + (h * q_rope_h + q * q_rope_q)[:, None] + p[None, :],
        mask=live_M[:, None] & in_P[None, :],
        other=0.0,
    )

    length = S
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b * lengths_b), S).to(tl.int32)
    blocks_each = tl.cdiv(tl.cdiv(length, BLOCK_S), splits)
    begin = split * blocks_each * BLOCK_S
    end = tl.minimum(begin + blocks_each * BLOCK_S, length)
    if PAGE == 0:
        latent += b * latent_b
        k_rope += b * k_rope_b
    else:
        pages += b * pages_b
    if MASK != _NO_MASK:
        mask += b * mask_b

    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MR = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        read_S = s < end
        allowed_MS = read_S[None, :]
        if MASK != _NO_MASK:
            # What no row may attend is not read: it may be anything, and costs nothing
            if QUERIES == 1:
                added_MS = tl.load(mask + s, mask=read_S, other=0).to(tl.float32)[None, :]
            else:
                added_MS = tl.load(mask + (q * mask_q)[:, None] + s[None, :], mask=read_S[None, :], other=0)
                added_MS = added_MS.to(tl.float32)
            if MASK == _ADDITIVE:
                allowed_MS = allowed_MS & (added_MS > lowest)
            else:
                allowed_MS = allowed_MS & (added_MS != 0)
            read_S = tl.max(allowed_MS.to(tl.int32), 0) != 0
        if CAUSAL:
            allowed_MS = allowed_MS & (s[None, :] <= (length - QUERIES + q)[:, None])
        if PAGE == 0:
            latent_at, k_rope_at = s * latent_s, s * k_rope_s
        else:
            page = tl.load(pages + s // PAGE, mask=read_S, other=0).to(tl.int64)
            latent_at = page * latent_b + s % PAGE * latent_s
            k_rope_at = page * k_rope_b + s % PAGE * k_rope_s
        latent_SR = tl.load(latent + latent_at[:, None] + r[None, :], mask=read_S[:, None] & in_R[None, :], other=0.0)
        k_rope_SP = tl.load(k_rope + k_rope_at[:, None] + p[None, :], mask=read_S[:, None] & in_P[None, :], other=0.0)

        scores_MS = tl.dot(q_rope_MP, tl.trans(k_rope_SP), input_precision=PRECISION)
        scores_MS = tl.dot(q_latent_MR, tl.trans(latent_SR), scores_MS, input_precision=PRECISION) * scale
        if MASK == _ADDITIVE:
            scores_MS += added_MS * _LOG2_E
        scores_MS = tl.where(allowed_MS, scores_MS, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(scores_MS, 1))
        # A row that may attend nothing so far has no maximum to subtract
        base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        weights_MS = tl.exp2(scores_MS - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MS, 1)
        acc_MR = tl.dot(
            weights_MS.to(latent_SR.dtype), latent_SR, acc_MR * shrink_M[:, None], input_precision=PRECISION
        )
        top_M = new_top_M

    # 0 where a query may attend nothing
    some_M = sum_M != 0.0
    sum_M = tl.where(some_M, sum_M, 1.0)
    acc_MR = acc_MR / sum_M[:, None]
    written = live_M[:, None] & in_R[None, :]
    if out is not None:
        at_M = b * out_b + h * out_h + q * out_q
        tl.store(out + at_M[:, None] + r[None, :], acc_MR.to(out.dtype.element_ty), mask=written)
    else:
        rows_M = (b * splits + split) * H * QUERIES + m
        tl.store(logs_out + rows_M, tl.where(some_M, top_M + tl.log2(sum_M), float("-inf")), mask=live_M)
        if begin < end:
            tl.store(sums_out + rows_M[:, None] * R + r[None, :], acc_MR, mask=written)


@triton.jit(do_not_specialize=["splits"])
def decode_whole(
    out,
    sums,
    logs,
    splits,
    rows,
    out_b,
    out_h,
    out_q,
    QUERIES: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Puts the parts of a context together. Grid: rows, sequences, blocks of columns."""
    m = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    logs += b * splits * rows + m
    sums += (b * splits * rows + m) * R
    every = tl.arange(0, _MOST_PARTS)
    logs_T = tl.load(logs + every * rows, mask=every < splits, other=float("-inf"))
    top = tl.max(logs_T, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs_T - top), 0)
    acc_R = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, splits, _PARTS_AT_ONCE):
        t = first + tl.arange(0, _PARTS_AT_ONCE)
        share_T = tl.exp2(tl.load(logs + t * rows, mask=t < splits, other=float("-inf")) - top)
        # Empty parts have left no sum
        read = (share_T > 0.0)[:, None] & (r < R)[None, :]
        part_TR = tl.load(sums + (t * rows)[:, None].to(tl.int64) * R + r[None, :], mask=read, other=0.0)
        acc_R += tl.sum(share_T[:, None] * part_TR, 0)
    acc_R = acc_R / tl.where(total == 0.0, 1.0, total)
    at = b * out_b + m // QUERIES * out_h + m % QUERIES * out_q
    tl.store(out + at + r, acc_R.to(out.dtype.element_ty), mask=r < R)


def attend(
    q_latent_HBQR: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask_BQS: torch.Tensor | None,
    lengths_B: torch.Tensor | None,
    pages: torch.Tensor | None,
    causal: bool,
    scaling: float,
    precision: str,
    processors: int,
) -> torch.Tensor:
    """Launches both programs, on tensors that were checked; `(H, B, Q, R)`.

    Args:
        precision: of products of fp32, as in `tl.dot`.
        processors: of the device, among which contexts are divided.
    """
    H, B, Q, R = q_latent_HBQR.shape
    P, page = q_rope_BHQP.shape[-1], 0 if pages is None else latent.shape[1]
    S = latent.shape[1] if pages is None else pages.shape[1] * page
    tile = decode_tiles(family_of(latent.device), H * Q, latent.dtype, page)
    resident = tile.pop("RESIDENT")
    row_blocks = triton.cdiv(H * Q, tile["BLOCK_M"])
    splits = parts(B * row_blocks, triton.cdiv(S, tile["BLOCK_S"]), processors * resident)
    out_HBQR = torch.empty_like(q_latent_HBQR, memory_format=torch.contiguous_format)
    sums_out = logs_out = None
    if splits > 1:
        sums_out = latent.new_empty(B, splits, H * Q, R, dtype=torch.float32)
        logs_out = latent.new_empty(B, splits, H * Q, dtype=torch.float32)
    out_h, out_b, out_q, _ = out_HBQR.stride()
    masks = BOOLEAN if mask_BQS is not None and mask_BQS.dtype == torch.uint8 else ADDITIVE
    decode_part[(row_blocks, splits, B)](
        out_HBQR if splits == 1 else None,
        sums_out,
        logs_out,
        q_latent_HBQR,
        q_rope_BHQP,
        latent,
        k_rope,
        mask_BQS,
        lengths_B,
        pages,
        scaling * LOG2_E,
        0.0 if mask_BQS is None or masks == BOOLEAN else torch.finfo(mask_BQS.dtype).min,
        H,
        S,
        splits,
        q_latent_HBQR.stride(1),
        q_latent_HBQR.stride(0),
        q_latent_HBQR.stride(2),
        *q_rope_BHQP.stride()[:3],
        *latent.stride()[:2],
        *k_rope.stride()[:2],
        0 if mask_BQS is None else mask_BQS.stride(0),
        0 if mask_BQS is None else mask_BQS.stride(1),
        0 if lengths_B is None else lengths_B.stride(0),
        0 if pages is None else pages.stride(0),
        out_b,
        out_h,
        out_q,
        QUERIES=Q,
        R=R,
        P=P,
        PAGE=page,
        MASK=NO_MASK if mask_BQS is None else masks,
        CAUSAL=causal,
        PRECISION=precision,
        BLOCK_R=padded(R),
        BLOCK_P=padded(P),
        **tile,
    )
    if splits > 1:
        decode_whole[(H * Q, B, triton.cdiv(R, COLUMNS))](
            out_HBQR,
            sums_out,
            logs_out,
            splits,
            H * Q,
            out_b,
            out_h,
            out_q,
            QUERIES=Q,
            R=R,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return out_HBQR


def padded(width: int) -> int:
    """The width of a block that holds so many columns: a power of two, 16 at least for products."""
    return max(triton.next_power_of_2(width), 16)


def decode_tiles(family: str, rows: int, dtype: torch.dtype, page: int) -> dict[str, int]:
    """Constants and compiler's options of `decode_part` on a family of devices, and `RESIDENT`.

    Args:
        rows: heads times queries. page: positions of a page, 0 for a cache in one piece.
    """
    kind = "fp32" if dtype is torch.float32 else "16" if rows <= 16 else "32" if rows <= 32 else "64"
    tile = dict(tiles(f"mla_decode/{kind}", family))
    if page and FAMILIES[family].backend == "cuda":
        tile["num_stages"] += 1  # for the pages' numbers, which are read one stage before the latents
    return tile


@functools.lru_cache(maxsize=4096)
def parts(programs: int, blocks: int, places: int) -> int:
    """Into how many parts contexts are divided, so that the device's places are taken evenly and not for too little.

    The same for all that a captured graph may be replayed on: it depends on the room for positions, and on nothing
    that only the device knows.

    Args:
        programs: that there would be undivided. blocks: of positions, in the longest context there is room for.
        places: programs that run at a time.
    """

    def cost(count: int) -> float:
        rounds = -(-programs * count // places)
        return rounds * (-(-blocks // count) + STARTING) + count * MERGING

    return min(range(1, max(min(blocks, MOST_PARTS), 1) + 1), key=cost)


def specimens(family: str) -> list[Specimen]:
    """Both programs as models use them: 16 heads (Moonlight) and 128 (DeepSeek-V3), latents of 512 and 64."""
    kinds: list[tuple[str, int, int, torch.dtype, dict[str, Any]]] = [
        # Caches that grow, alone and as a padded batch; static ones; two queries where a draft is checked
        ("16 heads", 16, 1, torch.bfloat16, {}),
        ("16 heads, context of one part", 16, 1, torch.bfloat16, {"whole": True}),
        ("16 heads, additive mask", 16, 1, torch.float16, {"mask": ADDITIVE}),
        ("16 heads, static cache", 16, 1, torch.bfloat16, {"mask": BOOLEAN, "lengths": "i64"}),
        ("16 heads, two queries", 16, 2, torch.bfloat16, {"mask": BOOLEAN}),
        ("128 heads, static cache", 128, 1, torch.bfloat16, {"mask": BOOLEAN, "lengths": "i64"}),
        ("16 heads, pages", 16, 1, torch.bfloat16, {"page": 64, "lengths": "i32"}),
        ("16 heads, two queries, pages", 16, 2, torch.float16, {"page": 64, "lengths": "i32"}),
        ("128 heads, pages", 128, 1, torch.bfloat16, {"page": 64, "lengths": "i32"}),
        # The widest latents in fp32 that all GPUs without tiles of their own are sure to have room for
        ("16 heads, fp32", 16, 1, torch.float32, {"rank": 256 if family == "default" else 512}),
    ]
    found = [
        _part_specimen(family, f"decode_part, {label}", heads, queries, dtype, **rest)
        for label, heads, queries, dtype, rest in kinds
    ]
    numbers = dict.fromkeys(("splits", "rows", "out_b", "out_h", "out_q"), "i32")
    found.append(
        Specimen(
            "decode_whole, bf16",
            decode_whole,
            {"out": "*bf16:16", "sums": "*fp32:16", "logs": "*fp32:16", **numbers},
            {"QUERIES": 1, "R": 512, "COLUMNS": COLUMNS},
            {"num_warps": 4},
        )
    )
    return found


def _part_specimen(
    family: str,
    label: str,
    heads: int,
    queries: int,
    dtype: torch.dtype,
    whole: bool = False,
    mask: int = NO_MASK,
    lengths: str | None = None,
    page: int = 0,
    rank: int = 512,
) -> Specimen:
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    values = f"*{short}:16"
    options = decode_tiles(family, heads * queries, dtype, page)
    del options["RESIDENT"]
    given = {
        "out": values if whole else None,
        "sums_out": None if whole else "*fp32:16",
        "logs_out": None if whole else "*fp32:16",
        **dict.fromkeys(("q_latent", "q_rope", "latent", "k_rope"), values),
        "mask": {NO_MASK: None, BOOLEAN: "*u8:16", ADDITIVE: values}[mask],
        "lengths": None if lengths is None else f"*{lengths}:16",
        "pages": "*i32:16" if page else None,
        "scale": "fp32",
        "lowest": "fp32",
        **dict.fromkeys(("H", "q_latent_b", "q_latent_h", "q_latent_q", "q_rope_b", "q_rope_h", "q_rope_q"), "i32:16"),
        **dict.fromkeys(("latent_b", "latent_s", "k_rope_b", "k_rope_s", "out_b", "out_h", "out_q"), "i32:16"),
        **dict.fromkeys(("S", "splits", "mask_b", "mask_q", "lengths_b", "pages_b"), "i32"),
    }
    constants = {
        "QUERIES": queries,
        "R": rank,
        "P": 64,
        "PAGE": page,
        "MASK": mask,
        "CAUSAL": page > 0,
        "PRECISION": "ieee",
        "BLOCK_M": options.pop("BLOCK_M"),
        "BLOCK_S": options.pop("BLOCK_S"),
        "BLOCK_R": rank,
        "BLOCK_P": 64,
        **{name: None for name, kind in given.items() if kind is None},
    }
    signature = {name: kind for name, kind in given.items() if kind is not None}
    return Specimen(f"{label}, {short}", decode_part, signature, constants, options, matrix=dtype is not torch.float32)
