"""GGUF files on disk: what their headers say, checked before a weight is read, and rows of one tensor at a time.

Large models come as several files, `NAME-00001-of-00003.gguf`, the first of which has the metadata of all.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError, listing
from .format import BITS, FLOATS, TYPE_NAMES, row_bytes


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Bytes read at once of a tensor that is converted
_CHUNK = 16 << 20


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file, not read yet. `shape` is torch's, `offset` counts from the file's start."""

    name: str
    path: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def type_name(self) -> str:
        return TYPE_NAMES.get(self.ggml_type) or _other_types()[self.ggml_type][0]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Reads rows in order, some at a time: which ones, and their bytes, uint8 `(rows, row_bytes)`.

        Raises:
            CheckpointError: where the file ends before.
        """
        stop = self.rows if stop is None else stop
        step = max(1, _CHUNK // self.row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.row_bytes)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                data = torch.empty(last - first, self.row_bytes, dtype=torch.uint8)
                view, done = memoryview(data.view(-1).numpy()), 0
                while done < len(view):
                    count = file.readinto(view[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise CheckpointError(f"{self.path}: the file ended while reading tensor '{self.name}'")
                    done += count
                yield slice(first - start, last - start), data


def _other_types() -> dict[int, tuple[str, int, int]]:
    """Types that the package `gguf` knows, by number: name, weights and bytes of a block."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "a GGUF file with other types than F32, F16, BF16, Q8_0 and Q4_0 needs the package gguf: "
            "`pip install gguf`"
        ) from error
    return {int(t): (t.name, *sizes) for t, sizes in gguf.GGML_QUANT_SIZES.items()}


def dequantized(rows: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """Rows of blocks of any type that the package `gguf` can dequantise, uint8 `(N, bytes)`, to fp32 `(N, K)`.

    Raises:
        NotImplementedError: for a type that it cannot.
    """
    import gguf

    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType(ggml_type)))


class _Header:
    """Reads the parts of a header one after another."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def numbers(self, format: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{format}")
        return layout.unpack(self.file.read(layout.size))

    def number(self, format: str) -> Any:
        return self.numbers(format)[0]

    def string(self) -> str:
        length = self.number("Q")
        data = self.file.read(length) if length < 1 << 32 else b""
        if len(data) != length:
            raise struct.error("a string goes beyond the end")
        return data.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value, or of an array of strings, such as a vocabulary, how many there are."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"its metadata has a value of type {kind}, which is unknown")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            return list(self.numbers(_SCALARS[kind], count))
        if kind != _STRING:
            raise ValueError(f"its metadata has an array of type {kind}, which is unknown")
        for _ in range(count):
            length = self.number("Q")
            if self.file.seek(length, os.SEEK_CUR) > os.fstat(self.file.fileno()).st_size:
                raise struct.error("a string goes beyond the end")
        return count


def _read_one(path: str) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = _Header(file)
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file")
        try:
            version, tensors, pairs = header.numbers("I")[0], header.number("Q"), header.number("Q")
            if version not in (2, 3):
                raise ValueError(f"version {version} of GGUF, or big-endian; 2 and 3 are read, little-endian")
            metadata = {}
            for _ in range(pairs):
                key = header.string()
                metadata[key] = header.value(header.number("I"))
            entries = []
            for _ in range(tensors):
                name = header.string()
                shape = tuple(reversed(header.numbers("Q", header.number("I"))))
                entries.append((name, shape, header.number("I"), header.number("Q")))
        except (struct.error, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path}: truncated, the file of {size} bytes ends within its header") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        alignment = metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    table = {name: _tensor(path, name, shape, kind, start + offset) for name, shape, kind, offset in entries}
    beyond = [f"'{tensor.name}'" for tensor in table.values() if tensor.offset + tensor.nbytes > size]
    if beyond:
        raise CheckpointError(f"{path}: truncated, the file of {size} bytes ends before tensors {listing(beyond)}")
    return metadata, table


def _tensor(path: str, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    width = shape[-1] if shape else 1
    if kind in FLOATS or (kind in BITS and width % 32 == 0):
        return GgufTensor(name, path, kind, shape, offset, row_bytes(kind, width))
    other = _other_types()
    if kind not in other:
        raise CheckpointError(f"{path}: tensor '{name}' is of type {kind}, which is unknown")
    type_name, weights, block = other[kind]
    if width % weights:
        raise CheckpointError(f"{path}: tensor '{name}' is {type_name} in rows of {width}, no multiple of {weights}")
    return GgufTensor(name, path, kind, shape, offset, width // weights * block)


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a model's file or files. Of arrays of strings `metadata` has the length only."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def __getitem__(self, name: str) -> GgufTensor:
        return self.tensors[name]


def read_gguf(path: str, sibling: Callable[[str], str] | None = None) -> GgufFile:
    """The headers of a GGUF file, and of the others where the model was split.

    Args:
        path: of the file, or of the first.
        sibling: function from another file's name to its path, by default beside the first.

    Raises:
        CheckpointError: naming the file and what is wrong: no GGUF, truncated, a type that is unknown.
    """
    metadata, tensors = _read_one(path)
    count = metadata.get("split.count", 0)
    if count > 1:
        folder, first = os.path.split(path)
        match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first)
        if match is None or int(match[2]) != count:
            raise CheckpointError(f"{path}: one of {count} files; give the first, NAME-00001-of-{count:05}.gguf")
        for i in range(2, count + 1):
            name = f"{match[1]}-{i:05}-of-{count:05}.gguf"
            other = os.path.join(folder, name) if sibling is None else sibling(name)
            if not os.path.isfile(other):
                raise CheckpointError(f"{path}: its other file {name} is not there")
            tensors |= _read_one(other)[1]
    return GgufFile(path, metadata, tensors)
