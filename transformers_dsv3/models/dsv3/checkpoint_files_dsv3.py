"""Safetensors files on disk: what their headers say, and reading one tensor at a time without mapping the file.

Nothing here knows a model. `resolve_checkpoint` finds the files Transformers would load, `read_header` checks a file
against its own header, `read_checkpoint` joins the files (and an index) to one table of `StoredTensor`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ...kernels.pages import in_huge_pages


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be loaded as it stands. The message names every file and tensor at fault.

    A `RuntimeError` too, which Transformers raises for shapes that do not fit.
    """


# Names of the safetensors format; a dtype that this torch lacks cannot be loaded by it either.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# The format's own limit: a longer header is refused by the reference reader.
_MAX_HEADER_BYTES = 100_000_000
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(slots=True)
class StoredTensor:
    """One tensor of a safetensors file, not read yet. Speaks the slice protocol of Transformers' loader.

    Bytes are read into fresh memory instead of being mapped: a mapped checkpoint counts as resident beside the model
    (twice the model at the peak), and a parameter that is a view of a mapped file dies when the file is rewritten.

    With `deferred`, indexing by `...` and `.to(device=...)` give a `StoredTensor` back, so that a conversion
    operation receives unread tensors and reads them one by one, straight into their place. The loader's threads would
    otherwise read ahead without a bound.

    `key` is the name after the user's renamings, by which a weight and its scale find each other; `name` unless set.
    """

    name: str
    path: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    deferred: bool = False
    device: torch.device | None = None
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or self.name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return _DTYPES[self.dtype_name]

    def get_dtype(self) -> str:
        """The dtype on disk by its safetensors name, as a safetensors slice gives it."""
        return self.dtype_name

    def get_shape(self) -> list[int]:
        """The shape on disk, as a safetensors slice gives it."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor | StoredTensor:
        if self.deferred and isinstance(index, EllipsisType):
            return self
        return self.read()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> StoredTensor:
        """Remember the device. The dtype is left to the operation that reads the tensor: it knows the parameter."""
        return self if device is None else replace(self, device=torch.device(device))

    def read(self) -> torch.Tensor:
        """Read into a new tensor of the shape and dtype on disk, on the remembered device."""
        out = in_huge_pages(torch.empty(self.shape, dtype=self.dtype, device="cpu"))
        self.read_into(out)
        return out if self.device is None else out.to(self.device)

    def read_into(self, out: torch.Tensor) -> None:
        """Read into `out`: contiguous, on the CPU, of the shape and dtype on disk. Raises `CheckpointError`."""
        if self.nbytes == 0:
            return
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while done < self.nbytes:  # one call returns at most 2 GiB on Linux
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path}: the file ended while reading tensor '{self.name}'")
                done += count


@dataclass(slots=True)
class DerivedTensor(StoredTensor):
    """A tensor that is computed from stored ones when it is read, such as a weight that the file holds packed.

    `dtype_name` and `shape` are those of the result; `path` and `name` say where it comes from. `room` makes the
    memory, of a shape and dtype, of a stack that it is to be part of; None where any will do.
    """

    compute: Callable[[], torch.Tensor] | None = None
    room: Callable[[Sequence[int], torch.dtype], torch.Tensor] | None = None

    def read_into(self, out: torch.Tensor) -> None:
        """Compute into `out`, of the shape of the result."""
        assert self.compute is not None
        out.copy_(self.compute())


def _tensor_entry(path: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Check one header entry. Raises `CheckpointError` where dtype, shape and extent do not agree."""
    try:
        dtype_name, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for tensor '{name}' is malformed ({error!r})") from error
    if dtype_name not in _DTYPES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {dtype_name}, which cannot be read here")
    expected = math.prod(shape) * _DTYPES[dtype_name].itemsize
    if start < 0 or stop - start != expected:
        raise CheckpointError(
            f"{path}: corrupt header, tensor '{name}' of shape {shape} and dtype {dtype_name} takes {expected} bytes, "
            f"its extent holds {stop - start}"
        )
    return StoredTensor(name, path, dtype_name, shape, data_start + start, stop - start)


def read_header(path: str) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, from its header alone: 8 bytes of length, then JSON.

    Raises `CheckpointError` naming the file where it is no safetensors file, is truncated, or where the header
    contradicts itself or the file's size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(len(_LFS_MAGIC))
        if prefix == _LFS_MAGIC:
            raise CheckpointError(f"{path}: this is a Git LFS pointer, not the tensors; run `git lfs pull` beside it")
        length = int.from_bytes(prefix[:8], "little") if len(prefix) >= 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file ({size} bytes, of which the header claims {length})"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
    except ValueError as error:
        raise CheckpointError(f"{path}: corrupt safetensors header ({error})") from error
    header.pop("__metadata__", None)
    tensors = {name: _tensor_entry(path, name, entry, 8 + length) for name, entry in header.items()}

    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: corrupt header, tensor '{tensor.name}' does not follow the one before it")
        end += tensor.nbytes
    if size != end:
        reason = "truncated" if size < end else "longer than its tensors"
        raise CheckpointError(f"{path}: {reason}, the file has {size} bytes and its header describes {end}")
    return tensors


def read_index(path: str) -> dict[str, str]:
    """`weight_map` of an index file: tensor name to shard file name. Raises `CheckpointError` naming the file."""
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index with a `weight_map` ({error!r})") from error


@dataclass(frozen=True)
class CheckpointFiles:
    """Resolved safetensors files, and the index that joins them (`None` for a single file)."""

    files: list[str]
    index: str | None = None


def read_checkpoint(files: Iterable[str], index: str | None = None) -> dict[str, StoredTensor]:
    """Headers of all files as one table by tensor name.

    Raises `CheckpointError` for the first broken file, for every shard that the index names and the disk lacks, and
    for every tensor that the index places in a shard which does not hold it.
    """
    files = list(files)
    absent = [path for path in files if not os.path.isfile(path)]
    if absent:
        raise CheckpointError(f"{index or 'the checkpoint'} names files that do not exist: {', '.join(absent)}")
    headers = {path: read_header(path) for path in files}
    if index is not None:
        by_name = {os.path.basename(path): path for path in files}
        wrong = []
        for name, shard in read_index(index).items():
            path = by_name.get(os.path.basename(shard))
            if path is None or name not in headers[path]:
                wrong.append(f"'{name}' in {shard}")
        if wrong:
            raise CheckpointError(f"{index} places tensors in shards which lack them: {listing(wrong)}")
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def listing(items: list[str], limit: int = 8) -> str:
    """`a, b, c and 12 more`: error messages about a 60-layer model stay readable."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def _with_variant(filename: str, variant: str | None) -> str:
    """`model.safetensors` to `model.fp16.safetensors`: the variant goes before the last suffix."""
    if not variant:
        return filename
    stem, _, suffix = filename.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def resolve_checkpoint(
    location: str,
    variant: str | None = None,
    explicit_filename: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> CheckpointFiles | None:
    """Find the safetensors files Transformers will load from a folder or a Hub repository (downloading if needed).

    `explicit_filename` is the config's `transformers_weights`. `hub_kwargs` are the download arguments of
    `from_pretrained` (`subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, …). Returns `None` where
    there is no safetensors checkpoint, and leaves the wording of that error to Transformers; but a place that only
    holds pickled weights (`pytorch_model.bin`) is refused with a `CheckpointError`.
    """
    kwargs = {key: value for key, value in (hub_kwargs or {}).items() if value is not None}
    subfolder = kwargs.get("subfolder", "")

    def find(filename: str) -> str | None:
        if os.path.isdir(location):
            path = os.path.join(location, subfolder, filename)
            return path if os.path.isfile(path) else None
        return cached_file(
            location,
            filename,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            **kwargs,
        )

    candidates = [explicit_filename] if explicit_filename else ["model.safetensors", "model.safetensors.index.json"]
    for candidate in candidates:
        filename = candidate if explicit_filename else _with_variant(candidate, variant)
        path = find(filename)
        if path is None:
            continue
        if not filename.endswith(".json"):
            return CheckpointFiles([path])
        if os.path.isdir(location):
            folder = os.path.dirname(path)
            return CheckpointFiles([os.path.join(folder, s) for s in sorted(set(read_index(path).values()))], path)
        return CheckpointFiles(get_checkpoint_shard_files(location, path, **kwargs)[0], path)

    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        pickled = find(_with_variant(name, variant))
        if pickled is not None:
            raise CheckpointError(
                f"{pickled}: only pickled weights here, and unpickling can run code. If you trust their source, "
                "convert them once: `from_pretrained(..., use_safetensors=False)`, then `save_pretrained(...)`"
            )
    return None
