"""Pairs of a token and an expert, sorted by expert on the device, without the host ever learning a count.

Shape suffixes: T tokens, K experts chosen a token, E experts, S = T * K pairs, X = E + 1 with one place for pairs of
experts that are none of the E (of another rank, under expert parallelism), C chunks of pairs.
"""

import torch
import triton
import triton.language as tl

from .experts_rows import LAYERS, padded, specimen
from .tuned import Specimen, family_of, tiles


# Up to so many pairs each program compares its own with all of them, in one launch
FEW = 2048


@triton.jit
def _expert_of(index, i, S, E: tl.constexpr):
    """The experts of some pairs, E for those that are none of the E and for places past the last pair."""
    expert = tl.load(index + i, mask=i < S, other=E)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def sort_few(
    index, order, offsets, S, E: tl.constexpr, PAD_X: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr
):
    """Ranks BLOCK pairs among all, OTHERS at a time; the first program counts as well."""
    i_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine_B = _expert_of(index, i_B, S, E)
    rank_B = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, OTHERS):
        j_O = start + tl.arange(0, OTHERS)
        theirs_O = _expert_of(index, j_O, S, E)
        same = (theirs_O[None, :] == mine_B[:, None]) & (j_O[None, :] < i_B[:, None])
        before = (theirs_O[None, :] < mine_B[:, None]) | same
        rank_B += tl.sum((before & (j_O[None, :] < S)).to(tl.int32), 1)
    tl.store(order + rank_B, i_B, mask=i_B < S)
    if tl.program_id(0) == 0:
        counts_X = tl.zeros((PAD_X,), tl.int32)
        for start in range(0, S, BLOCK):
            counts_X += tl.histogram(_expert_of(index, start + tl.arange(0, BLOCK), S, E), PAD_X)
        x = tl.arange(0, PAD_X)
        tl.store(offsets + x, tl.cumsum(counts_X, 0) - counts_X, mask=x <= E)


@triton.jit(do_not_specialize=["S"])
def count_chunk(index, counts, S, E: tl.constexpr, PAD_X: tl.constexpr, BLOCK: tl.constexpr):
    """How many pairs of each expert a chunk has, `(C, PAD_X)`."""
    i_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts_X = tl.histogram(_expert_of(index, i_B, S, E), PAD_X)
    tl.store(counts + tl.program_id(0) * PAD_X + tl.arange(0, PAD_X), counts_X)


@triton.jit(do_not_specialize=["S", "chunks"])
def sort_chunk(
    index,
    counts,
    order,
    offsets,
    S,
    chunks,
    E: tl.constexpr,
    PAD_X: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Places a chunk's pairs behind those of earlier experts, and of its expert in earlier chunks."""
    chunk = tl.program_id(0)
    x = tl.arange(0, PAD_X)
    all_X = tl.zeros((PAD_X,), tl.int32)
    earlier_X = tl.zeros((PAD_X,), tl.int32)
    for start in range(0, chunks, OTHERS):
        c_O = start + tl.arange(0, OTHERS)
        counts_OX = tl.load(counts + c_O[:, None] * PAD_X + x[None, :], mask=c_O[:, None] < chunks, other=0)
        all_X += tl.sum(counts_OX, 0)
        earlier_X += tl.sum(tl.where(c_O[:, None] < chunk, counts_OX, 0), 0)
    first_X = tl.cumsum(all_X, 0) - all_X
    if chunk == 0:
        tl.store(offsets + x, first_X, mask=x <= E)
    i_B = chunk * BLOCK + tl.arange(0, BLOCK)
    mine_B = _expert_of(index, i_B, S, E)
    place_B = tl.gather(first_X + earlier_X, mine_B, 0)
    for start in range(0, BLOCK, OTHERS):
        j_O = chunk * BLOCK + start + tl.arange(0, OTHERS)
        theirs_O = _expert_of(index, j_O, S, E)
        same = (theirs_O[None, :] == mine_B[:, None]) & (j_O[None, :] < i_B[:, None])
        place_B += tl.sum(same.to(tl.int32), 1)
    tl.store(order + place_B, i_B, mask=i_B < S)


def sort_pairs(index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the pairs of tokens and experts by expert, those of an expert by token.

    Args:
        index_TK: `(T, K)`, contiguous, of any integer dtype, T at least 1; what is none of the experts comes last.

    Returns:
        `order_S`: pairs `t * K + k` in that order. `offsets_X`: where each expert's begin, `(E + 1,)`, the last one
        the number of pairs that have an expert. Both int32.
    """
    S = index_TK.numel()
    order_S = index_TK.new_empty(S, dtype=torch.int32)
    offsets_X = index_TK.new_empty(num_experts + 1, dtype=torch.int32)
    width = padded(num_experts + 1)
    if S <= FEW:
        row = tiles("experts_sort_few", family_of(index_TK.device))
        sort_few[(triton.cdiv(S, row["BLOCK"]),)](index_TK, order_S, offsets_X, S, num_experts, width, **row)
        return order_S, offsets_X
    row = tiles("experts_sort_chunk", family_of(index_TK.device))
    chunks = triton.cdiv(S, row["BLOCK"])
    counts_CX = index_TK.new_empty((chunks, width), dtype=torch.int32)
    counting = {"BLOCK": row["BLOCK"], "num_warps": row["num_warps"]}
    count_chunk[(chunks,)](index_TK, counts_CX, S, num_experts, width, **counting)
    sort_chunk[(chunks,)](index_TK, counts_CX, order_S, offsets_X, S, chunks, num_experts, width, **row)
    return order_S, offsets_X


def specimens(family: str) -> list[Specimen]:
    """The programs above for 64 and 256 experts."""
    found = []
    few, chunk = tiles("experts_sort_few", family), tiles("experts_sort_chunk", family)
    count = {key: value for key, value in chunk.items() if key != "OTHERS"}
    for layer, (_, E, _, _) in LAYERS.items():
        sizes = {"S": "i32", "E": E, "PAD_X": padded(E + 1)}
        index, order = {"index": "*i64:16"}, {"order": "*i32:16", "offsets": "*i32:16"}
        counts = {"counts": "*i32:16"}
        programs = [
            (sort_few, {**index, **order}, few),
            (count_chunk, {**index, **counts}, count),
            (sort_chunk, {**index, **counts, **order, "chunks": "i32"}, chunk),
        ]
        for kernel, arguments, row in programs:
            label = f"{kernel.__name__}, {layer}"
            found.append(specimen(label, kernel, {**arguments, **sizes}, row, matrix=False))
    return found
