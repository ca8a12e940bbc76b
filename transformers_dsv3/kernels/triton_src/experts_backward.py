"""Gradients of routed experts, from the gates and ups that the forward pass kept; activations are computed again.

Each weight's gradient is written once, by one program a tile, zero for experts without tokens; the others are sums in
a fixed order like the output. So the same inputs give the same bits.

Shape suffixes as in `experts_forward`; in programs M and N are rows and columns of a tile, R what a product sums over.
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


@triton.jit
def _halves(x_MN):
    """The left and the right half of a tile's columns."""
    halves_MHN = tl.reshape(x_MN, (x_MN.shape[0], 2, x_MN.shape[1] // 2))
    return tl.split(tl.permute(halves_MHN, (0, 2, 1)))


@triton.jit
def _through_swiglu(
    d_act_MN,
    w_M,
    in_M,
    kept,
    d_kept,
    activation,
    row,
    column,
    I: tl.constexpr,
    NEEDS_KEPT: tl.constexpr,
    NEEDS_ACTIVATION: tl.constexpr,
):
    """Writes a part of `d_kept` and `activation` that begins at a row and a column; the part's sums for `d_mixing`."""
    m_M = tl.arange(0, d_act_MN.shape[0])
    n_N = column + tl.arange(0, d_act_MN.shape[1])
    in_MN = in_M[:, None] & (n_N[None, :] < I)
    # Within a tile 32 bits are enough, and take half the registers
    first = row.to(tl.int64) * I
    wide_MN = m_M[:, None] * (2 * I) + n_N[None, :]
    gate_MN = tl.load(kept + 2 * first + wide_MN, mask=in_MN, other=0).to(tl.float32)
    up_MN = tl.load(kept + 2 * first + I + wide_MN, mask=in_MN, other=0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(gate_MN)
    silu_MN = gate_MN * sigmoid_MN
    if NEEDS_ACTIVATION:
        activation_MN = (silu_MN * up_MN * w_M[:, None]).to(activation.dtype.element_ty)
        tl.store(activation + first + (m_M[:, None] * I + n_N[None, :]), activation_MN, mask=in_MN)
    if NEEDS_KEPT:
        d_up_MN = d_act_MN * w_M[:, None]
        d_gate_MN = d_up_MN * up_MN * sigmoid_MN * (1 + gate_MN * (1 - sigmoid_MN))
        tl.store(d_kept + 2 * first + wide_MN, d_gate_MN.to(d_kept.dtype.element_ty), mask=in_MN)
        d_up_MN = (d_up_MN * silu_MN).to(d_kept.dtype.element_ty)
        tl.store(d_kept + 2 * first + I + wide_MN, d_up_MN, mask=in_MN)
    return tl.sum(silu_MN * up_MN * d_act_MN, 1)


@triton.jit(do_not_specialize=["S", "row_tiles"])
def activation_gradient(
    grad,
    order,
    offsets,
    mixing,
    weight,
    kept,
    d_kept,
    activation,
    d_mixing,
    S,
    row_tiles,
    K: tl.constexpr,
    E: tl.constexpr,
    PAD_E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    NEEDS_KEPT: tl.constexpr,
    NEEDS_ACTIVATION: tl.constexpr,
    NEEDS_MIXING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """From the output's gradient `(T, D)`, through the down projection `(E, D, I)` and SwiGLU.

    `d_kept` `(S, 2I)`: gradients of gates and ups. `activation` `(S, I)`: as the down projection had it. `d_mixing`
    `(tiles of columns, S)`: what each tile of columns adds to the gradient of a pair's mixing weight.
    """
    m, n = place_of(tl.program_id(0), row_tiles, tl.cdiv(I, BLOCK_N), GROUP)
    expert, start, end = tile_of(m, offsets, E, PAD_E, BLOCK_M)
    if expert >= E:
        return
    row_M = start + tl.arange(0, BLOCK_M)
    in_M = row_M < end
    pair_M = tl.load(order + row_M, mask=in_M, other=0)
    n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_act_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NEEDS_KEPT or NEEDS_MIXING:
        grad_M = grad + (pair_M // K).to(tl.int64) * D
        weight += expert.to(tl.int64) * (D * I)
        for start_r in range(0, D, BLOCK_R):
            r = start_r + tl.arange(0, BLOCK_R)
            grad_MR = read(grad_M[:, None] + r[None, :], r[None, :] < D, D % BLOCK_R == 0)
            in_RN = (r[:, None] < D) & (n_N[None, :] < I)
            whole: tl.constexpr = D % BLOCK_R == 0 and I % BLOCK_N == 0
            weight_RN = read(weight + r[:, None] * I + n_N[None, :], in_RN, whole).to(grad_MR.dtype)
            d_act_MN = tl.dot(grad_MR, weight_RN, d_act_MN, input_precision=PRECISION)
    # In quarters, since a whole tile of all that is computed from here has no room in registers. What the first one
    # writes keeps the compiler from reading for the others before.
    w_M = tl.load(mixing + pair_M, mask=in_M, other=0).to(tl.float32)
    left_MN, right_MN = _halves(d_act_MN)
    parts = _halves(left_MN) + _halves(right_MN)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(4):
        sum_M += _through_swiglu(
            parts[i],
            w_M,
            in_M,
            kept,
            d_kept,
            activation,
            start,
            n * BLOCK_N + i * (BLOCK_N // 4),
            I,
            NEEDS_KEPT,
            NEEDS_ACTIVATION,
        )
    if NEEDS_MIXING:
        tl.store(d_mixing + n.to(tl.int64) * S + pair_M, sum_M, mask=in_M)


@triton.jit
def weight_gradient(
    left,
    right,
    order,
    offsets,
    out,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`out` `(E, M, N)`: the sum over an expert's pairs of a row of `left` times a row of `right`.

    One of both is `(S, M or N)`, sorted by expert, the other one `(T, M or N)`: `left` with LEFT_BY_TOKEN.
    """
    per_expert: tl.constexpr = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // per_expert
    m, n = place_of(tl.program_id(0) % per_expert, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m_M = m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    out_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_r in range(start, end, BLOCK_R):
        r = start_r + tl.arange(0, BLOCK_R)
        in_R = r < end
        token_R = (tl.load(order + r, mask=in_R, other=0) // K).to(tl.int64)
        left_R = token_R if LEFT_BY_TOKEN else r.to(tl.int64)
        right_R = r.to(tl.int64) if LEFT_BY_TOKEN else token_R
        # Rows of other experts are sums' parts here, so both are masked: NaN times 0 is NaN
        left_RM = tl.load(left + left_R[:, None] * M + m_M[None, :], mask=in_R[:, None] & (m_M[None, :] < M), other=0)
        right_RN = tl.load(
            right + right_R[:, None] * N + n_N[None, :], mask=in_R[:, None] & (n_N[None, :] < N), other=0
        )
        out_MN = tl.dot(tl.trans(left_RM), right_RN, out_MN, input_precision=PRECISION)
    place_MN = out + expert.to(tl.int64) * (M * N) + (m_M[:, None] * N + n_N[None, :])
    tl.store(place_MN, out_MN.to(out.dtype.element_ty), mask=(m_M[:, None] < M) & (n_N[None, :] < N))


def through_activations(
    grad_TD: torch.Tensor,
    order_S: torch.Tensor,
    offsets_X: torch.Tensor,
    mixing_TK: torch.Tensor,
    down_EDI: torch.Tensor,
    kept_SI: torch.Tensor,
    needs_kept: bool,
    needs_activation: bool,
    needs_mixing: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of gates and ups `(S, 2I)`, the activations `(S, I)`, and the gradient of mixing weights `(T, K)`.

    Each is None where it is not needed. Rows of the first two are sorted by expert, as those of `kept_SI` are.
    """
    (T, K), (E, D, I) = mixing_TK.shape, down_EDI.shape
    S = T * K
    row = row_of("activation_gradient", max(height_of(T, S, E), 64), grad_TD.dtype, down_EDI)
    row_tiles, columns = most_tiles(S, E, row["BLOCK_M"]), triton.cdiv(I, row["BLOCK_N"])
    d_kept_SI = torch.empty_like(kept_SI) if needs_kept else None
    activation_SI = kept_SI.new_empty(S, I) if needs_activation else None
    # Zero for pairs of experts of another rank
    d_mixing = mixing_TK.new_zeros((columns, T, K), dtype=torch.float32) if needs_mixing else None
    activation_gradient[(row_tiles * columns,)](
        grad_TD,
        order_S,
        offsets_X,
        mixing_TK,
        down_EDI,
        kept_SI,
        d_kept_SI,
        activation_SI,
        d_mixing,
        S,
        row_tiles,
        K=K,
        E=E,
        PAD_E=padded(E),
        D=D,
        I=I,
        NEEDS_KEPT=needs_kept,
        NEEDS_ACTIVATION=needs_activation,
        NEEDS_MIXING=needs_mixing,
        PRECISION=precision(),
        **row,
    )
    return d_kept_SI, activation_SI, None if d_mixing is None else d_mixing.sum(0).to(mixing_TK.dtype)


def weight_gradients(
    left: torch.Tensor,
    right: torch.Tensor,
    order_S: torch.Tensor,
    offsets_X: torch.Tensor,
    top_k: int,
    left_by_token: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(E, M, N)`: the sum over each expert's pairs of a row of `left` times a row of `right`.

    Args:
        left: `(S, M)` sorted by expert, or with `left_by_token` `(T, M)`. right: the other one, of N columns.
        dtype: of the result; sums are in fp32.
    """
    E, M, N = len(offsets_X) - 1, left.shape[1], right.shape[1]
    kind = "half"
    if left.dtype == torch.float32:
        kind = "fp32" if precision() == "ieee" else "tf32"
    row = tiles(f"experts_weight_gradient/{kind}", family_of(left.device))
    out_EMN = left.new_empty(E, M, N, dtype=dtype)
    weight_gradient[(E * triton.cdiv(M, row["BLOCK_M"]) * triton.cdiv(N, row["BLOCK_N"]),)](
        left,
        right,
        order_S,
        offsets_X,
        out_EMN,
        K=top_k,
        M=M,
        N=N,
        LEFT_BY_TOKEN=left_by_token,
        PRECISION=precision(),
        **row,
    )
    return out_EMN


def specimens(family: str) -> list[Specimen]:
    """The programs above where everything has a gradient."""
    found = []
    K, E, D, I = LAYERS["Moonlight"]
    sorting: dict[str, object] = {"order": "*i32:16", "offsets": "*i32:16", "K": K}
    everything = dict.fromkeys(("NEEDS_KEPT", "NEEDS_ACTIVATION", "NEEDS_MIXING"), True)
    for kind, (dtype, weight) in kinds(family).items():
        arguments = {
            **dict.fromkeys(("grad", "kept", "d_kept", "activation"), f"*{dtype}:16"),
            **{
                "weight": f"*{weight}:16",
                "mixing": "*fp32:16",
                "d_mixing": "*fp32:16",
                "S": "i32",
                "row_tiles": "i32",
            },
            **{"E": E, "PAD_E": padded(E), "D": D, "I": I, "PRECISION": precision_of(kind)},
        }
        row = tiles(f"experts_activation_gradient/{kind}", family)
        label = f"activation_gradient, Moonlight, {kind}, {dtype} times {weight}"
        arguments = {**sorting, **arguments, **everything}
        found.append(specimen(label, activation_gradient, arguments, row, matrix=kind != "fp32"))
        if kind == "64":
            continue
        kind = "half" if dtype == "bf16" else kind
        row = tiles(f"experts_weight_gradient/{kind}", family)
        arguments = {"left": f"*{dtype}:16", "right": f"*{dtype}:16", "out": f"*{weight}:16"}
        arguments |= {**sorting, "PRECISION": precision_of(kind)}
        for name, M, N, by_token in (("gate_up_proj", 2 * I, D, False), ("down_proj", D, I, True)):
            label = f"weight_gradient, Moonlight, {name}, {kind}, {dtype} to {weight}"
            sizes = {"M": M, "N": N, "LEFT_BY_TOKEN": by_token}
            found.append(specimen(label, weight_gradient, {**arguments, **sizes}, row, matrix=kind != "fp32"))
    return found
