"""Sequences and the cache they are in, as the compiled code takes them: rows of one tensor, or pages of a pool."""

import ctypes

import torch

from . import library
from .operators import LONGEST_HEAD, TYPES, out_of_memory, refuse_shape, require_storage


_pointer, _integer = ctypes.c_void_p, ctypes.c_int64
# Products with keys are taken so many at a time, and do not cross pages
KEYS_AT_ONCE = 16


class Cache(ctypes.Structure):
    """`dsv3_cache` of `csrc/dsv3.h`."""

    _fields_ = [
        *((name, _pointer) for name in ("latent", "k_rope")),
        *((name, _integer * 3) for name in ("latent_of", "k_rope_of")),
        ("page_size", _integer),
    ]

    @classmethod
    def of(cls, latent: torch.Tensor, k_rope: torch.Tensor) -> "Cache":
        """
        Args:
            latent: `(layers, pages, ..., page size, R)`, k_rope: `(layers, pages, ..., page size, P)`; pages are the
                rows of a contiguous cache.

        Raises:
            ValueError: a cache whose storage was freed.
        """
        for tensor in (latent, k_rope):
            if (
                not tensor.is_contiguous()
                or (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > tensor.untyped_storage().nbytes()
            ):
                require_storage(latent=latent, k_rope=k_rope)
        a, b = latent.stride(), k_rope.stride()
        strides = ((a[0], a[1], a[-2]), (b[0], b[1], b[-2]))
        return cls(latent.data_ptr(), k_rope.data_ptr(), *strides, latent.shape[-2])


class Batch(ctypes.Structure):
    """`dsv3_batch` of `csrc/dsv3.h`."""

    _fields_ = [
        *((name, _pointer) for name in ("start", "first", "table", "position", "mask", "token", "wanted")),
        *((name, _integer) for name in ("B", "W", "table_of", "mask_of")),
    ]


class NewTokens:
    """New tokens of several sequences, one after another, behind what a cache has of each.

    Nothing is checked here: C reads and writes where these say.

    Args:
        starts: tokens that are cached of each sequence. counts: new ones of each.
        tables: int32 `(B, pages)`, contiguous; None where row b of the cache is sequence b.
        positions: int64 of all new tokens, contiguous, where their rotary angles are found; None for their places.
        mask: bool `(B, S)`, False for what no query may attend, its last dimension contiguous; None for nothing.
        tokens: int64 ids of all new tokens, contiguous; None where their embeddings are given.
        wanted: int64 `(W,)`, contiguous, new tokens whose logits are computed; None for all.

    Attributes:
        count: new tokens. wanted_count: logits. longest: tokens of the longest sequence then.
    """

    def __init__(
        self,
        starts: list[int],
        counts: list[int],
        tables: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
    ):
        B, first, firsts = len(starts), 0, [0]
        for count in counts:
            first += count
            firsts.append(first)
        self.count, self.longest = first, max(map(int.__add__, starts, counts))
        self._numbers = torch.tensor([*starts, *firsts], dtype=torch.int64, device="cpu")
        self.wanted_count = first if wanted is None else len(wanted)
        self._kept = tables, positions, mask, tokens, wanted
        start = self._numbers.data_ptr()
        self.structure = Batch(
            start,
            start + 8 * B,
            None if tables is None else tables.data_ptr(),
            None if positions is None else positions.data_ptr(),
            None if mask is None else mask.data_ptr(),
            None if tokens is None else tokens.data_ptr(),
            None if wanted is None else wanted.data_ptr(),
            B,
            self.wanted_count,
            0 if tables is None else tables.stride(0),
            0 if mask is None else mask.stride(0),
        )


def pages_refusal(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    scaling: float,
    pool: tuple[torch.Tensor, torch.Tensor],
    *rest: object,
) -> str | None:
    """The rest of it: what the pages decide."""
    return pool_refusal(q_nope.dtype, *pool)


def pool_refusal(dtype: torch.dtype, latent: torch.Tensor, k_rope: torch.Tensor) -> str | None:
    """Why the compiled code does not read a pool of pages for activations of a dtype, or None."""
    if not latent.is_cpu or not k_rope.is_cpu or latent.dtype is not dtype or k_rope.dtype is not dtype:
        return f"takes pages on the CPU of the activations' dtype ({dtype})"
    if latent.shape[-2] % KEYS_AT_ONCE:
        return f"takes pages of a multiple of {KEYS_AT_ONCE} tokens"
    return None


def attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    scaling: float,
    pool: tuple[torch.Tensor, torch.Tensor],
    layer: int,
    batch: NewTokens,
) -> torch.Tensor:
    """Puts new latents into a layer of a cache, and attends there.

    Args:
        q_nope, q_rope: `(1, H, T, N)` and `(1, H, T, P)`, their last dimension contiguous.
        latent, k_rope: of the T new tokens, `(1, 1, T, R)` and `(1, 1, T, P)`.
        kv_b_weight: `(H * (N + V), R)`, contiguous.
        pool: latents and rotary keys of all layers, as [`Cache.of`] takes them.

    Returns:
        `(1, T, H, V)`.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    _, H, T, N = q_nope.shape
    R, P, dtype = latent.shape[-1], k_rope.shape[-1], q_nope.dtype
    for name, tensor, shape in (
        ("q_nope", q_nope, (1, H, batch.count, N)),
        ("q_rope", q_rope, (1, H, T, P)),
        ("latent", latent, (1, 1, T, R)),
        ("k_rope", k_rope, (1, 1, T, P)),
    ):
        if tensor.shape != shape:
            refuse_shape(name, tensor, shape)
        if tensor.dtype is not dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q_nope {dtype}")
    if kv_b_weight.shape[-1] != R or kv_b_weight.dtype is not dtype or not kv_b_weight.is_contiguous():
        raise ValueError(f"kv_b_weight is not contiguous {dtype} with rows of {R}")
    if max(R, P) > LONGEST_HEAD:
        raise ValueError(f"latents or rotary parts are longer than {LONGEST_HEAD}")
    require_storage(q_nope=q_nope, q_rope=q_rope, latent=latent, k_rope=k_rope, kv_b_weight=kv_b_weight)
    latent, k_rope = latent.contiguous(), k_rope.contiguous()
    V = kv_b_weight.shape[0] // H - N
    out = q_nope.new_empty(1, T, H, V)
    cache = Cache.of(*pool)
    if library.loaded.dsv3_attention_cached(
        ctypes.addressof(cache),
        ctypes.addressof(batch.structure),
        layer,
        q_nope.data_ptr(),
        (ctypes.c_int64 * 2)(q_nope.stride(1), q_nope.stride(2)),
        q_rope.data_ptr(),
        (ctypes.c_int64 * 2)(q_rope.stride(1), q_rope.stride(2)),
        latent.data_ptr(),
        k_rope.data_ptr(),
        kv_b_weight.data_ptr(),
        TYPES[dtype],
        scaling,
        out.data_ptr(),
        *(H, N, P, R, V),
        torch.get_num_threads(),
    ):
        out_of_memory()
    return out
