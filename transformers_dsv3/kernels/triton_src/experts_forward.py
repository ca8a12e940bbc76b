"""Routed experts: gate, up and SwiGLU in one program, down in another, then the sum over a token's experts.

The mixing weight multiplies the activations before the down projection, in fp32 and before their only rounding. So its
gradient is a product of activations, and experts' outputs need not be kept for it. Each pair's output is written where
the pair lies among a token's, and a last program sums these in the order in which they were chosen: no atomic
additions, and the same bits every time.

Shape suffixes: T tokens, K experts chosen a token, E experts, S = T * K pairs, X = E + 1, D hidden size, I width of an
expert; in programs M rows of a tile (pairs of one expert), N its columns, R what a product sums over.
"""

import torch
import triton
import triton.language as tl

from .experts_rows import (
    LAYERS,
    height_of,
    kinds,
    most_tiles,
    padded,
    place_of,
    precision,
    precision_of,
    read,
    row_of,
    specimen,
    tile_of,
)
from .tuned import Specimen, family_of, tiles


QUANTIZED = tl.constexpr(32)  # INT8 weights, along the summed dimension, that share a scale


@triton.jit(do_not_specialize=["row_tiles"])
def gate_up(
    hidden,
    order,
    offsets,
    mixing,
    weight,
    scale,
    activation,
    kept,
    row_tiles,
    K: tl.constexpr,
    E: tl.constexpr,
    PAD_E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`activation` `(S, I)`: SiLU(gate) * up * mixing weight; with KEEP `kept` `(S, 2I)`: gate and up."""
    m, n = place_of(tl.program_id(0), row_tiles, tl.cdiv(I, BLOCK_N), GROUP)
    expert, start, end = tile_of(m, offsets, E, PAD_E, BLOCK_M)
    if expert >= E:
        return
    row_M = start + tl.arange(0, BLOCK_M)
    in_M = row_M < end
    pair_M = tl.load(order + row_M, mask=in_M, other=0)
    hidden_M = hidden + (pair_M // K).to(tl.int64) * D
    n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_N = weight + expert.to(tl.int64) * (2 * I * D) + n_N * D
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_r in range(0, D, BLOCK_R):
        r = start_r + tl.arange(0, BLOCK_R)
        x_MR = read(hidden_M[:, None] + r[None, :], r[None, :] < D, D % BLOCK_R == 0)
        weight_RN = gate_N[None, :] + r[:, None]
        in_RN = (r[:, None] < D) & (n_N[None, :] < I)
        whole: tl.constexpr = D % BLOCK_R == 0 and I % BLOCK_N == 0
        gate_RN = read(weight_RN, in_RN, whole)
        up_RN = read(weight_RN + I * D, in_RN, whole)
        if SCALED:
            scale_RN = scale + (expert * (2 * I) + n_N[None, :]) * (D // QUANTIZED) + r[:, None] // QUANTIZED
            gate_RN = gate_RN.to(tl.float32) * read(scale_RN, in_RN, whole)
            up_RN = up_RN.to(tl.float32) * read(scale_RN + I * (D // QUANTIZED), in_RN, whole)
        gate_RN = gate_RN.to(x_MR.dtype)
        up_RN = up_RN.to(x_MR.dtype)
        gate_MN = tl.dot(x_MR, gate_RN, gate_MN, input_precision=PRECISION)
        up_MN = tl.dot(x_MR, up_RN, up_MN, input_precision=PRECISION)
    in_MN = in_M[:, None] & (n_N[None, :] < I)
    # Within a tile 32 bits are enough, and take half the registers
    first = start.to(tl.int64) * I
    if KEEP:
        kept_MN = kept + 2 * first + (tl.arange(0, BLOCK_M)[:, None] * (2 * I) + n_N[None, :])
        tl.store(kept_MN, gate_MN.to(kept.dtype.element_ty), mask=in_MN)
        tl.store(kept_MN + I, up_MN.to(kept.dtype.element_ty), mask=in_MN)
    w_M = tl.load(mixing + pair_M, mask=in_M, other=0).to(tl.float32)
    activation_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN * w_M[:, None]
    place_MN = activation + first + (tl.arange(0, BLOCK_M)[:, None] * I + n_N[None, :])
    tl.store(place_MN, activation_MN.to(activation.dtype.element_ty), mask=in_MN)


@triton.jit(do_not_specialize=["row_tiles"])
def pair_product(
    rows,
    order,
    offsets,
    weight,
    scale,
    out,
    row_tiles,
    E: tl.constexpr,
    PAD_E: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_R: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`out[pair]` `(S, N)`: `rows` `(S, R)`, sorted by expert, times their expert's weight."""
    m, n = place_of(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert, start, end = tile_of(m, offsets, E, PAD_E, BLOCK_M)
    if expert >= E:
        return
    row_M = start + tl.arange(0, BLOCK_M)
    in_M = row_M < end
    # Rows behind the expert's own are read as its last one, and not written
    rows_M = rows + tl.minimum(row_M, end - 1).to(tl.int64) * R
    n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += expert.to(tl.int64) * (N * R)
    out_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_r in range(0, R, BLOCK_R):
        r = start_r + tl.arange(0, BLOCK_R)
        x_MR = read(rows_M[:, None] + r[None, :], r[None, :] < R, R % BLOCK_R == 0)
        in_RN = (r[:, None] < R) & (n_N[None, :] < N)
        whole: tl.constexpr = R % BLOCK_R == 0 and N % BLOCK_N == 0
        weight_RN = read(weight + (n_N[None, :] * STRIDE_N + r[:, None] * STRIDE_R), in_RN, whole)
        if SCALED:
            scale_RN = scale + (expert * N + n_N[None, :]) * (R // QUANTIZED) + r[:, None] // QUANTIZED
            weight_RN = weight_RN.to(tl.float32) * read(scale_RN, in_RN, whole)
        out_MN = tl.dot(x_MR, weight_RN.to(x_MR.dtype), out_MN, input_precision=PRECISION)
    pair_M = tl.load(order + row_M, mask=in_M, other=0).to(tl.int64)
    place_MN = out + pair_M[:, None] * N + n_N[None, :]
    tl.store(place_MN, out_MN.to(out.dtype.element_ty), mask=in_M[:, None] & (n_N[None, :] < N))


@triton.jit(do_not_specialize=["T"])
def sum_pairs(
    pairs,
    index,
    out,
    T,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out` `(T, D)`: the sum of a token's rows of `pairs` `(T * K, D)`, of those that have an expert, in fp32."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_TD = (t[:, None] < T) & (d[None, :] < D)
    row_T = t.to(tl.int64) * K
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        expert_T = tl.load(index + row_T + k, mask=t < T, other=E)
        written_T = (expert_T >= 0) & (expert_T < E)
        pairs_TD = pairs + (row_T + k)[:, None] * D + d[None, :]
        sum_TD += tl.load(pairs_TD, mask=in_TD & written_T[:, None], other=0).to(tl.float32)
    out_TD = out + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_TD, sum_TD.to(out.dtype.element_ty), mask=in_TD)


def activations(
    hidden_TD: torch.Tensor,
    order_S: torch.Tensor,
    offsets_X: torch.Tensor,
    mixing_TK: torch.Tensor,
    gate_up_EID: torch.Tensor,
    scale: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SiLU(gate) * up * mixing weight of each pair, `(S, I)`, and with `keep` gates and ups, `(S, 2I)`; else None.

    Rows are sorted by expert, those of pairs without one are not written.

    Args:
        hidden_TD: of the dtype of the products and of the results. mixing_TK: of any floating dtype.
        order_S, offsets_X: see `experts_sort.sort_pairs`.
        gate_up_EID: of that dtype, fp32 or, with fp16 scales `(E, 2I, D / 32)`, INT8.
    """
    (T, K), (E, width, D), I = mixing_TK.shape, gate_up_EID.shape, gate_up_EID.shape[1] // 2
    S = T * K
    row = row_of("gate_up", height_of(T, S, E), hidden_TD.dtype, gate_up_EID)
    act_SI = hidden_TD.new_empty(S, I)
    kept_SI = hidden_TD.new_empty(S, width) if keep else None
    row_tiles = most_tiles(S, E, row["BLOCK_M"])
    gate_up[(row_tiles * triton.cdiv(I, row["BLOCK_N"]),)](
        hidden_TD,
        order_S,
        offsets_X,
        mixing_TK,
        gate_up_EID,
        scale,
        act_SI,
        kept_SI,
        row_tiles,
        K=K,
        E=E,
        PAD_E=padded(E),
        D=D,
        I=I,
        SCALED=scale is not None,
        KEEP=keep,
        PRECISION=precision(),
        **row,
    )
    return act_SI, kept_SI


def products(
    rows_SR: torch.Tensor,
    order_S: torch.Tensor,
    offsets_X: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    transposed: bool,
    tokens: int,
) -> torch.Tensor:
    """Each pair's row times its expert's weight, `(S, N)`, where the pair lies among its token's; others unwritten.

    Args:
        rows_SR: sorted by expert. weight: `(E, N, R)`, or `(E, R, N)` where `transposed`.
        scale: of INT8, `(E, N, R / 32)`.
    """
    S, R = rows_SR.shape
    E = weight.shape[0]
    N = weight.shape[2 if transposed else 1]
    row = row_of("product", height_of(tokens, S, E), rows_SR.dtype, weight)
    out_SN = rows_SR.new_empty(S, N)
    row_tiles = most_tiles(S, E, row["BLOCK_M"])
    pair_product[(row_tiles * triton.cdiv(N, row["BLOCK_N"]),)](
        rows_SR,
        order_S,
        offsets_X,
        weight,
        scale,
        out_SN,
        row_tiles,
        E=E,
        PAD_E=padded(E),
        N=N,
        R=R,
        STRIDE_N=1 if transposed else R,
        STRIDE_R=N if transposed else 1,
        SCALED=scale is not None,
        PRECISION=precision(),
        **row,
    )
    return out_SN


def sums(pairs_SD: torch.Tensor, index_TK: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """`(T, D)`: the sums of the rows of a token's pairs that have an expert."""
    T, K = index_TK.shape
    D = pairs_SD.shape[1]
    row = tiles("experts_sum", family_of(pairs_SD.device))
    out_TD = pairs_SD.new_empty(T, D, dtype=dtype)
    grid = (triton.cdiv(T, row["BLOCK_T"]), triton.cdiv(D, row["BLOCK_D"]))
    sum_pairs[grid](pairs_SD, index_TK, out_TD, T, K=K, E=num_experts, D=D, **row)
    return out_TD


def specimens(family: str) -> list[Specimen]:
    """The programs above: every height of tiles, training, INT8 weights, fp32, autocast."""
    trained = kinds(family)
    served = {"16": ("bf16", "bf16"), "32": ("bf16", "bf16"), "128": ("bf16", "bf16")}
    int8 = {"16": ("bf16", "i8"), "64": ("bf16", "i8")}
    found = [
        *(_gate_up_specimen(family, "Moonlight", kind, *dtypes, keep=True) for kind, dtypes in trained.items()),
        *(_gate_up_specimen(family, "Moonlight", kind, *dtypes, keep=False) for kind, dtypes in served.items()),
        *(_gate_up_specimen(family, "Moonlight", kind, *dtypes, keep=False) for kind, dtypes in int8.items()),
        _gate_up_specimen(family, "V3", "128", "fp16", "fp16", keep=True),
        *(_product_specimen(family, "Moonlight", kind, *dtypes, transposed=True) for kind, dtypes in trained.items()),
        *(_product_specimen(family, "Moonlight", kind, *dtypes, transposed=False) for kind, dtypes in served.items()),
        *(_product_specimen(family, "Moonlight", kind, *dtypes, transposed=False) for kind, dtypes in int8.items()),
        _product_specimen(family, "V3", "64", "fp16", "fp16", transposed=False),
    ]
    K, E, D, _ = LAYERS["Moonlight"]
    sizes = {"pairs": "*bf16:16", "index": "*i64:16", "out": "*bf16:16", "T": "i32", "K": K, "E": E, "D": D}
    found.append(specimen("sum_pairs, Moonlight", sum_pairs, sizes, tiles("experts_sum", family), matrix=False))
    return found


def _shared_arguments(layer: str, kind: str, weight: str) -> dict[str, object]:
    E, scaled = LAYERS[layer][1], weight == "i8"
    return {
        **dict.fromkeys(("order", "offsets"), "*i32:16"),
        **{"weight": f"*{weight}:16", "scale": "*fp16:16" if scaled else None, "SCALED": scaled},
        **{"row_tiles": "i32", "E": E, "PAD_E": padded(E), "PRECISION": precision_of(kind)},
    }


def _gate_up_specimen(family: str, layer: str, kind: str, dtype: str, weight: str, keep: bool) -> Specimen:
    K, _, D, I = LAYERS[layer]
    arguments = {
        **_shared_arguments(layer, kind, weight),
        **{"hidden": f"*{dtype}:16", "mixing": "*fp32:16", "activation": f"*{dtype}:16", "K": K, "D": D, "I": I},
        **{"kept": f"*{dtype}:16" if keep else None, "KEEP": keep},
    }
    label = f"gate_up, {layer}, {kind}, {dtype} times {weight}{', kept' * keep}"
    return specimen(label, gate_up, arguments, tiles(f"experts_gate_up/{kind}", family), matrix=kind != "fp32")


def _product_specimen(family: str, layer: str, kind: str, dtype: str, weight: str, transposed: bool) -> Specimen:
    _, _, D, I = LAYERS[layer]
    down, back = {"R": I, "STRIDE_N": I, "STRIDE_R": 1}, {"R": 2 * I, "STRIDE_N": 1, "STRIDE_R": D}
    arguments = {
        **_shared_arguments(layer, kind, weight),
        **{"rows": f"*{dtype}:16", "out": f"*{dtype}:16", "N": D},
        **(back if transposed else down),
    }
    label = f"pair_product, {layer}, {kind}, {dtype} times {weight}{', transposed' * transposed}"
    return specimen(label, pair_product, arguments, tiles(f"experts_product/{kind}", family), matrix=kind != "fp32")
