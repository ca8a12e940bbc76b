"""What the compiled library's operations share: how they become torch operators, and checks of what C trusts.

Each operation is a torch operator, `torch.ops.transformers_dsv3.*`, with a fake kernel, so torch.compile and
torch.export trace through it, and checks shapes and types before any memory is touched. None has a gradient:
`selection` leaves calls that need one to PyTorch. Where nothing looks at operators, its kernel is called without
PyTorch's dispatcher, which costs more than a small step of decoding.

Quantised weights `(..., N, K)` are whole numbers of 8 bits, int8, or of 4 bits, uint8 `(..., N, K / 2)`, with fp16
scales `(..., N, K / 32)`, one for each group of 32 along the input: the values of GGUF's Q8_0 and Q4_0. Byte b < 16 of
a group of 4 bits holds elements b and b + 16, each plus 8, the first in its lower half. Activations meet them rounded
to 8 bits in groups of 32 (`int8_activations`), or as they are, weights then in the activations' dtype.

In decoding each call from Python to Python counts: checks are written out where they are needed, and only what they
find is told by functions of their own.
"""

import ctypes

import torch


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
GROUP = 32  # of csrc/inner_loops.h
LONGEST_HEAD = 2048  # K_BLOCK of csrc/inner_loops.h
MOST_ROTATED = 1024  # of csrc/rows.c


def fake_like(x, *rest):  # type: ignore[no-untyped-def]
    """The fake kernel of what keeps shape and dtype of its first argument."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def out_of_memory() -> None:
    raise MemoryError("the compiled CPU backend found no memory for its intermediate results")


def refuse_dtype(name: str, x: torch.Tensor) -> None:
    raise ValueError(f"{name} is {x.dtype}, not fp32 or bf16")


def refuse_shape(name: str, tensor: torch.Tensor, shape: tuple) -> None:
    raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, not {shape}")


def _reach(tensor: torch.Tensor) -> int:
    """Bytes of the storage up to the end of a tensor's last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize


def require_storage(**tensors: torch.Tensor | None) -> None:
    """Refuses tensors that reach beyond their storage: C reads what their shapes say.

    Tensors are not told when their storage is freed or cut, as FSDP1 does by `untyped_storage().resize_(0)`.

    Raises:
        ValueError: with the tensor's name.
    """
    for name, tensor in tensors.items():
        if tensor is not None and _reach(tensor) > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} needs {_reach(tensor)} bytes of a storage of {tensor.untyped_storage().nbytes()}: it was "
                "freed, as FSDP frees parameters, or cut"
            )


def addresses(
    x: torch.Tensor, *weights: tuple[str, torch.Tensor | None, torch.Tensor | None, tuple]
) -> list[int | None]:
    """Where weights and their scales lie, one after another, None for those that are left out.

    Args:
        x: the activations.
        weights: name, weight, scale and shape, of 4-bit ones before they are packed. In x's dtype, or quantised with
            scales.

    Raises:
        ValueError: for anything else.
    """
    dtype = x.dtype
    if not x.is_contiguous() or (x.storage_offset() + x.numel()) * x.itemsize > x.untyped_storage().nbytes():
        require_storage(x=x)
    found: list[int | None] = []
    for name, weight, scale, shape in weights:
        if weight is None:
            found += (None, None)
            continue
        stored = (*shape[:-1], shape[-1] // 2) if weight.dtype is torch.uint8 else shape
        if weight.shape != stored:
            refuse_shape(name, weight, stored)
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if (weight.storage_offset() + weight.numel()) * weight.itemsize > weight.untyped_storage().nbytes():
            require_storage(**{name: weight})
        if weight.dtype is dtype:
            if scale is not None:
                raise ValueError(f"{name} has a scale, but is not quantised")
            found += (weight.data_ptr(), None)
            continue
        if weight.dtype is not torch.int8 and weight.dtype is not torch.uint8:
            raise ValueError(f"{name} is {weight.dtype}, the activations are {dtype}")
        if shape[-1] % GROUP:
            raise ValueError(f"{name} is quantised in rows of {shape[-1]}, not a multiple of {GROUP}")
        groups = (*shape[:-1], shape[-1] // GROUP)
        if scale is None:
            raise ValueError(f"{name} is quantised without a scale")
        if scale.dtype is not torch.float16 or scale.shape != groups or not scale.is_contiguous():
            raise ValueError(
                f"the scale of {name} is {scale.dtype} of {tuple(scale.shape)}, not contiguous fp16 of {groups}"
            )
        require_storage(**{f"the scale of {name}": scale})
        found += (weight.data_ptr(), scale.data_ptr())
    return found


def dense_rows(**tensors: torch.Tensor) -> list[tuple[torch.Tensor, ctypes.Array]]:
    """Tensors, copied where their last dimension is not dense in memory, and the strides of all dimensions but it.

    Raises:
        ValueError: as `require_storage`.
    """
    found = []
    for name, tensor in tensors.items():
        stride = tensor.stride()
        last = tensor.storage_offset()
        for n, step in zip(tensor.shape, stride):
            last += (n - 1) * step
        if (last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
            require_storage(**{name: tensor})
        if stride[-1] != 1 and tensor.shape[-1] != 1:
            tensor = tensor.contiguous()
            stride = tensor.stride()
        found.append((tensor, (ctypes.c_int64 * (len(stride) - 1))(*stride[:-1])))
    return found


def require_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `shape` `(B, Q, P)` or `(1, Q, P)`, contiguous.

    Raises:
        ValueError: for angles of another dtype than x's, or another shape.
    """
    B, Q, P = shape
    require_storage(cos=cos, sin=sin)
    if P > MOST_ROTATED or P % 2:
        raise ValueError(f"x has {P} dimensions to rotate, not an even number up to {MOST_ROTATED}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.shape not in ((B, Q, P), (1, Q, P)) or tensor.dtype is not x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {x.dtype} of {shape}")
    if cos.shape != sin.shape:
        cos, sin = cos.expand(B, Q, P), sin.expand(B, Q, P)
    return cos.contiguous(), sin.contiguous()
