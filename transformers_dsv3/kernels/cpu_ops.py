"""The compiled library's functions as torch operators, `torch.ops.transformers_dsv3.*`.

Each has a fake kernel, so torch.compile and torch.export trace through it, and checks shapes and types before any
memory is touched. None has a gradient: `selection` leaves calls that need one to PyTorch.

INT8 weights are whole numbers times an fp32 scale for each output channel. Activations then meet them as 16-bit whole
numbers with a scale for each row, which lose less than bf16 does, or, for many rows at once, as 8-bit ones
(`int8_activations`), which are about twice as fast.
"""

import ctypes

import torch

from .cpu_library import library


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
LONGEST_HEAD = 2048  # K_BLOCK of csrc/inner_loops.h
MOST_ROTATED = 1024  # of csrc/rows.c

_definitions = torch.library.Library("transformers_dsv3", "DEF")
_definitions.define("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool int8_activations) -> Tensor")
_definitions.define(
    "mixture(Tensor x, Tensor? gate_up, Tensor? gate_up_scale, Tensor? down, Tensor? down_scale, Tensor? expert, "
    "Tensor? weight, Tensor? shared_gate, Tensor? shared_gate_scale, Tensor? shared_up, Tensor? shared_up_scale, "
    "Tensor? shared_down, Tensor? shared_down_scale, bool int8_activations) -> Tensor"
)
_definitions.define(
    "attention_absorbed(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor kv_b_weight, Tensor? mask, "
    "float scaling) -> Tensor"
)
_definitions.define(
    "attention_expanded(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor? mask, int first_query, "
    "float scaling) -> Tensor"
)
_definitions.define(
    "route(Tensor x, Tensor weight, Tensor bias, int groups, int top_groups, int top_k, bool normalize, float factor) "
    "-> (Tensor, Tensor, Tensor)"
)
_definitions.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_definitions.define(
    "project(Tensor x, Tensor? q_a, Tensor? q_a_scale, Tensor? q_a_bias, Tensor? q_norm, float q_eps, Tensor q_b, "
    "Tensor? q_b_scale, Tensor kv_a, Tensor? kv_a_scale, Tensor? kv_a_bias, Tensor kv_norm, float kv_eps, Tensor cos, "
    "Tensor sin, bool interleave, int heads, bool int8_activations) -> (Tensor, Tensor, Tensor)"
)
_definitions.define("rotate(Tensor x, Tensor cos, Tensor sin, bool interleave) -> Tensor")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check_activations(name: str, x: torch.Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} is {x.dtype}, not fp32 or bf16")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, not {shape}")


def _check_weight(name: str, weight: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor, shape: tuple) -> None:
    """`weight` of `shape` in x's dtype, or INT8 with fp32 scales for its rows."""
    _check_shape(name, weight, shape)
    if not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    if weight.dtype == torch.int8:
        if scale is None:
            raise ValueError(f"{name} is INT8 without a scale")
        if scale.dtype != torch.float32 or scale.shape != shape[:-1] or not scale.is_contiguous():
            raise ValueError(
                f"the scale of {name} is {scale.dtype} of {tuple(scale.shape)}, not contiguous fp32 of {shape[:-1]}"
            )
    else:
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} is {weight.dtype}, the activations are {x.dtype}")
        if scale is not None:
            raise ValueError(f"{name} has a scale, but is not INT8")


def _done(status: int) -> None:
    if status:
        raise MemoryError("the compiled CPU backend found no memory for its intermediate results")


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    _check_activations("x", x)
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x has rows of {x.shape[-1]}, weight of {K}")
    _check_weight("weight", weight, scale, x, (N, K))
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (N,) or not bias.is_contiguous()):
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}, not contiguous {x.dtype} of ({N},)")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel():
        status = library().dsv3_linear(
            x.data_ptr(),
            TYPES[x.dtype],
            K,
            weight.data_ptr(),
            TYPES[weight.dtype],
            K,
            _address(scale),
            _address(bias),
            y.data_ptr(),
            N,
            y.numel() // N,
            N,
            K,
            int8_activations,
            torch.get_num_threads(),
        )
        _done(status)
    return y


def _mixture(
    x: torch.Tensor,
    gate_up: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    expert: torch.Tensor | None,
    weight: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    shared_gate_scale: torch.Tensor | None,
    shared_up: torch.Tensor | None,
    shared_up_scale: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    shared_down_scale: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    _check_activations("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions, not 2")
    T, D = x.shape
    E = inner = K = S = 0
    weights = []
    if gate_up is not None:
        if down is None or expert is None or weight is None:
            raise ValueError("gate_up is given without down, expert or weight")
        E, inner = gate_up.shape[0], gate_up.shape[1] // 2
        K = expert.shape[1]
        _check_weight("gate_up", gate_up, gate_up_scale, x, (E, 2 * inner, D))
        _check_weight("down", down, down_scale, x, (E, D, inner))
        weights += [gate_up, down]
        expert, weight = expert.contiguous(), weight.float().contiguous()
        if expert.dtype != torch.int64 or expert.shape != (T, K):
            raise ValueError("expert is not int64 of (T, K)")
        _check_shape("weight", weight, (T, K))
    if shared_gate is not None:
        if shared_up is None or shared_down is None:
            raise ValueError("shared_gate is given without shared_up or shared_down")
        S = shared_gate.shape[0]
        _check_weight("shared_gate", shared_gate, shared_gate_scale, x, (S, D))
        _check_weight("shared_up", shared_up, shared_up_scale, x, (S, D))
        _check_weight("shared_down", shared_down, shared_down_scale, x, (D, S))
        weights += [shared_gate, shared_up, shared_down]
    if len({w.dtype for w in weights}) != 1:
        raise ValueError("the weights are of several dtypes, or there are none")
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        status = library().dsv3_mixture(
            x.data_ptr(),
            TYPES[x.dtype],
            T,
            D,
            TYPES[weights[0].dtype],
            _address(gate_up),
            _address(gate_up_scale),
            _address(down),
            _address(down_scale),
            E,
            inner,
            _address(expert),
            _address(weight),
            K,
            _address(shared_gate),
            _address(shared_gate_scale),
            _address(shared_up),
            _address(shared_up_scale),
            _address(shared_down),
            _address(shared_down_scale),
            S,
            out.data_ptr(),
            int8_activations,
            torch.get_num_threads(),
        )
        _done(status)
    return out


def _dense_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, copied where their last dimension is not dense in memory."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _strides(tensor: torch.Tensor) -> ctypes.Array:
    """Strides of all dimensions but the last."""
    strides = tensor.stride()
    return (ctypes.c_int64 * (len(strides) - 1))(*strides[:-1])


def _mask_arguments(mask: torch.Tensor | None, shape: tuple[int, int, int]) -> tuple:
    """`(mask kept alive, address, is_bytes, strides)` of a mask broadcastable to `(B, 1, Q, S)`."""
    if mask is None:
        return None, None, 0, None
    B, Q, S = shape
    if mask.dim() != 4 or any(n not in (1, size) for n, size in zip(mask.shape, (B, 1, Q, S))):
        raise ValueError(f"the mask is of shape {tuple(mask.shape)}, not {(B, 1, Q, S)}")
    if mask.dtype != torch.bool:
        mask = mask.float()
    mask = mask.expand(B, 1, Q, S)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    strides = (ctypes.c_int64 * 2)(mask.stride(0), mask.stride(2))
    return mask, mask.data_ptr(), mask.dtype == torch.bool, strides


def _attention_absorbed(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    B, H, Q, N = q_nope.shape
    S, R = latent.shape[1:]
    P, V = q_rope.shape[-1], kv_b_weight.shape[0] // H - N
    _check_activations("q_nope", q_nope)
    _check_shape("q_rope", q_rope, (B, H, Q, P))
    _check_shape("latent", latent, (B, S, R))
    _check_shape("k_rope", k_rope, (B, S, P))
    _check_weight("kv_b_weight", kv_b_weight, None, q_nope, (H * (N + V), R))
    if len({t.dtype for t in (q_nope, q_rope, latent, k_rope)}) > 1:
        raise ValueError("the dtypes of queries and cache differ")
    if max(R, P) > LONGEST_HEAD:
        raise ValueError(f"latents or rotary parts are longer than {LONGEST_HEAD}")
    out = q_nope.new_empty(B, Q, H, V)
    q_nope, q_rope, latent, k_rope = _dense_rows(q_nope, q_rope, latent, k_rope)
    mask, mask_address, is_bytes, mask_strides = _mask_arguments(mask, (B, Q, S))
    status = library().dsv3_attention_absorbed(
        q_nope.data_ptr(),
        _strides(q_nope),
        q_rope.data_ptr(),
        _strides(q_rope),
        latent.data_ptr(),
        _strides(latent),
        k_rope.data_ptr(),
        _strides(k_rope),
        kv_b_weight.data_ptr(),
        TYPES[q_nope.dtype],
        mask_address,
        is_bytes,
        mask_strides,
        -1,
        scaling,
        out.data_ptr(),
        *(B, H, Q, S, N, P, R, V),
        torch.get_num_threads(),
    )
    _done(status)
    return out


def _attention_expanded(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    first_query: int,
    scaling: float,
) -> torch.Tensor:
    B, H, Q, N = q_nope.shape
    S, V, P = kv.shape[1], kv.shape[3] - N, q_rope.shape[-1]
    _check_activations("q_nope", q_nope)
    _check_shape("q_rope", q_rope, (B, H, Q, P))
    _check_shape("kv", kv, (B, S, H, N + V))
    _check_shape("k_rope", k_rope, (B, S, P))
    if len({t.dtype for t in (q_nope, q_rope, kv, k_rope)}) > 1:
        raise ValueError("the dtypes of queries and keys differ")
    if max(N, P) > LONGEST_HEAD:
        raise ValueError(f"keys are longer than {LONGEST_HEAD}")
    out = q_nope.new_empty(B, Q, H, V)
    q_nope, q_rope, kv, k_rope = _dense_rows(q_nope, q_rope, kv, k_rope)
    mask, mask_address, is_bytes, mask_strides = _mask_arguments(mask, (B, Q, S))
    status = library().dsv3_attention_expanded(
        q_nope.data_ptr(),
        _strides(q_nope),
        q_rope.data_ptr(),
        _strides(q_rope),
        kv.data_ptr(),
        _strides(kv),
        k_rope.data_ptr(),
        _strides(k_rope),
        TYPES[q_nope.dtype],
        mask_address,
        is_bytes,
        mask_strides,
        first_query,
        scaling,
        out.data_ptr(),
        *(B, H, Q, S, N, P, V),
        torch.get_num_threads(),
    )
    _done(status)
    return out


def _route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    top_groups: int,
    top_k: int,
    normalize: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_activations("x", x)
    T, D = x.shape
    E = weight.shape[0]
    _check_weight("weight", weight, None, x, (E, D))
    if bias.dtype != torch.float32 or bias.shape != (E,):
        raise ValueError(f"bias is not fp32 of ({E},)")
    if not (groups > 0 and E % groups == 0 and top_groups <= groups and top_k <= top_groups * (E // groups)):
        raise ValueError("groups do not fit")
    x, bias = x.contiguous(), bias.contiguous()
    logits, chosen_weight, expert = _fake_route(x, weight, bias, groups, top_groups, top_k, normalize, factor)
    status = library().dsv3_route(
        x.data_ptr(),
        weight.data_ptr(),
        TYPES[x.dtype],
        bias.data_ptr(),
        *(T, D, E, groups, top_groups, top_k),
        normalize,
        factor,
        logits.data_ptr(),
        chosen_weight.data_ptr(),
        expert.data_ptr(),
        torch.get_num_threads(),
    )
    _done(status)
    return logits, chosen_weight, expert


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check_activations("x", x)
    n = x.shape[-1]
    _check_weight("weight", weight, None, x, (n,))
    if x.dim() == 3 and x.shape[0] == 1 and x.stride(2) == 1:
        row = x.stride(1)  # a part of wider rows, as the latents are of their projection
    else:
        x, row = x.contiguous(), n
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        rows = y.numel() // n
        status = library().dsv3_rms_norm(
            x.data_ptr(),
            TYPES[x.dtype],
            row,
            weight.data_ptr(),
            eps,
            y.data_ptr(),
            rows,
            n,
            torch.get_num_threads(),
        )
        _done(status)
    return y


def _check_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: tuple[int, int, int]
) -> list[torch.Tensor]:
    B, Q, P = shape
    if P > MOST_ROTATED or P % 2:
        raise ValueError(f"x has {P} dimensions to rotate, not an even number up to {MOST_ROTATED}")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape not in ((B, Q, P), (1, Q, P)) or angles.dtype != x.dtype:
            raise ValueError(f"{name} is {angles.dtype} of shape {tuple(angles.shape)}, not {x.dtype} of {(B, Q, P)}")
    return [angles.contiguous().expand(B, Q, P) for angles in (cos, sin)]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    _check_activations("x", x)
    B, H, Q, P = x.shape
    cos, sin = _check_angles(x, cos, sin, (B, Q, P))
    (x,) = _dense_rows(x)
    y = x.new_empty(B, H, Q, P)
    library().dsv3_rotate(
        x.data_ptr(),
        _strides(x),
        cos.data_ptr(),
        sin.data_ptr(),
        _strides(cos),
        TYPES[x.dtype],
        interleave,
        y.data_ptr(),
        _strides(y),
        *(B, H, Q, P),
        torch.get_num_threads(),
    )
    return y


def _project(
    x: torch.Tensor,
    q_a: torch.Tensor | None,
    q_a_scale: torch.Tensor | None,
    q_a_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    q_eps: float,
    q_b: torch.Tensor,
    q_b_scale: torch.Tensor | None,
    kv_a: torch.Tensor,
    kv_a_scale: torch.Tensor | None,
    kv_a_bias: torch.Tensor | None,
    kv_norm: torch.Tensor,
    kv_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
    heads: int,
    int8_activations: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `(B, Q, H, N + P)`, rotated, latents `(B, 1, Q, R)`, rotary keys `(B, 1, Q, P)` of `x` `(B, Q, D)`."""
    _check_activations("x", x)
    B, Q, D = x.shape
    R, P = kv_norm.shape[0], cos.shape[-1]
    L = 0 if q_a is None else q_a.shape[0]
    _check_weight("kv_a", kv_a, kv_a_scale, x, (R + P, D))
    _check_weight("kv_norm", kv_norm, None, x, (R,))
    _check_weight("q_b", q_b, q_b_scale, x, (q_b.shape[0], L or D))
    if q_a is not None:
        if q_norm is None:
            raise ValueError("q_a needs q_norm")
        _check_weight("q_a", q_a, q_a_scale, x, (L, D))
        _check_weight("q_norm", q_norm, None, x, (L,))
    if kv_a.dtype != q_b.dtype or (q_a is not None and q_a.dtype != q_b.dtype):
        raise ValueError("the weights are of several dtypes")
    for name, bias, width in (("q_a_bias", q_a_bias, L), ("kv_a_bias", kv_a_bias, R + P)):
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (width,) or not bias.is_contiguous()):
            raise ValueError(
                f"{name} is {bias.dtype} of shape {tuple(bias.shape)}, not contiguous {x.dtype} of ({width},)"
            )
    if q_b.shape[0] % heads or q_b.shape[0] // heads < P:
        raise ValueError(f"q_b has {q_b.shape[0]} rows, not a multiple of {heads} heads of at least {P}")
    cos, sin = _check_angles(x, cos, sin, (B, Q, P))
    x = x.contiguous()
    q, latent, k_rope = _fake_project(
        x, q_a, None, None, None, 0.0, q_b, None, kv_a, None, None, kv_norm, 0.0, cos, sin, False, heads, False
    )
    status = library().dsv3_project(
        x.data_ptr(),
        TYPES[x.dtype],
        D,
        TYPES[q_b.dtype],
        _address(q_a),
        _address(q_a_scale),
        _address(q_a_bias),
        _address(q_norm),
        q_eps,
        L,
        q_b.data_ptr(),
        _address(q_b_scale),
        kv_a.data_ptr(),
        _address(kv_a_scale),
        _address(kv_a_bias),
        kv_norm.data_ptr(),
        kv_eps,
        cos.data_ptr(),
        sin.data_ptr(),
        _strides(cos),
        interleave,
        *(B, Q, heads, q.shape[-1] - P, P, R),
        q.data_ptr(),
        latent.data_ptr(),
        k_rope.data_ptr(),
        int8_activations,
        torch.get_num_threads(),
    )
    _done(status)
    return q, latent, k_rope


def _fake_project(  # type: ignore[no-untyped-def]
    x, q_a, q_a_scale, q_a_bias, q_norm, q_eps, q_b, q_b_scale, kv_a, kv_a_scale, kv_a_bias, kv_norm, kv_eps, cos, sin,
    interleave, heads, int8_activations,
):  # fmt: skip
    B, Q, _ = x.shape
    return (
        x.new_empty(B, Q, heads, q_b.shape[0] // heads),
        x.new_empty(B, 1, Q, kv_norm.shape[0]),
        x.new_empty(B, 1, Q, cos.shape[-1]),
    )


def _fake_linear(x, weight, scale, bias, int8_activations):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_attention_absorbed(q_nope, q_rope, latent, k_rope, kv_b_weight, mask, scaling):  # type: ignore[no-untyped-def]
    B, H, Q, N = q_nope.shape
    return q_nope.new_empty(B, Q, H, kv_b_weight.shape[0] // H - N)


def _fake_attention_expanded(q_nope, q_rope, kv, k_rope, mask, first_query, scaling):  # type: ignore[no-untyped-def]
    B, H, Q, N = q_nope.shape
    return q_nope.new_empty(B, Q, H, kv.shape[3] - N)


def _fake_route(x, weight, bias, groups, top_groups, top_k, normalize, factor):  # type: ignore[no-untyped-def]
    shapes = (x.shape[0], weight.shape[0]), (x.shape[0], top_k)
    return (
        x.new_empty(shapes[0], dtype=torch.float32),
        x.new_empty(shapes[1], dtype=torch.float32),
        x.new_empty(shapes[1], dtype=torch.int64),
    )


def _fake_like(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name, _kernel, _fake in (
    ("linear", _linear, _fake_linear),
    ("mixture", _mixture, _fake_like),
    ("attention_absorbed", _attention_absorbed, _fake_attention_absorbed),
    ("attention_expanded", _attention_expanded, _fake_attention_expanded),
    ("route", _route, _fake_route),
    ("rms_norm", _rms_norm, _fake_like),
    ("rotate", _rotate, _fake_like),
    ("project", _project, _fake_project),
):
    _definitions.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"transformers_dsv3::{_name}", _fake, lib=_definitions)
