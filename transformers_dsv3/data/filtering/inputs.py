"""Documents of JSONL, Parquet and text files, and what of them cannot be read: named, counted, never half a document.

Reading the same files again gives the same documents in the same order, whatever is broken in them: stages tell
documents by their place in a shard.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...option_error import OptionError


# Longer documents are left out: a worker's memory is bounded
MAX_DOCUMENT_BYTES = 64 << 20
# Files of a shard together; a file is never split
SHARD_BYTES = 64 << 20
JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")

Skip = Callable[[str, int | None, str], None]


@dataclass(frozen=True)
class InputFile:
    """A file of the input: where it is, its name under the path that was given, and its size in bytes."""

    path: str
    name: str
    size: int

    @property
    def kind(self) -> str:
        """`jsonl`, `parquet` or `text`."""
        if self.name.lower().endswith(JSONL):
            return "jsonl"
        return "parquet" if self.name.lower().endswith(".parquet") else "text"


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the text and, where there is one, the domain."""

    text: str = "text"
    domain: str = "domain"


@dataclass
class Row:
    """A document as it was read: its text unchanged, where it is from, and its other columns."""

    text: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)


def find_files(paths: Sequence[str | Path], option: str = "--input") -> list[InputFile]:
    """All files under some paths that are not hidden, by name.

    Raises:
        OptionError: a path is missing, or there is no file.
    """
    found: dict[str, InputFile] = {}
    for path in map(Path, paths):
        path = path.expanduser()
        if not path.exists():
            raise OptionError(option, f"{path}: no such file or folder")
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            if not any(part.startswith(".") for part in name.parts):
                found[str(file)] = InputFile(str(file), name.as_posix(), file.stat().st_size)
    if not found:
        raise OptionError(option, f"no file in {', '.join(map(str, paths))}")
    return [found[path] for path in sorted(found)]


def check_columns(files: Sequence[InputFile], columns: Columns) -> None:
    """Refuse an input whose first file of rows lacks the column of the text.

    Raises:
        OptionError: naming the file and its columns.
    """
    for file in files:
        if file.kind == "text" or not file.size:
            continue
        try:
            names = _column_names(file)
        except Exception:  # it is broken, which reading it names
            continue
        if names is not None and columns.text not in names:
            raise OptionError(
                "--text-column", f"{file.path} has no column {columns.text!r}; it has {', '.join(sorted(names))}"
            )
        return


def _column_names(file: InputFile) -> list[str] | None:
    if file.kind == "parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(file.path).names)
    with _opened(file.path) as stream:
        row = json.loads(stream.readline(MAX_DOCUMENT_BYTES))
    return list(row) if isinstance(row, dict) else None


def shards(files: Sequence[InputFile], shard_bytes: int = SHARD_BYTES) -> list[list[InputFile]]:
    """Files in their order, so many together as make about `shard_bytes` bytes."""
    parts: list[list[InputFile]] = [[]]
    size = 0
    for file in files:
        if parts[-1] and size + file.size > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += file.size
    return parts


def read_rows(files: Sequence[InputFile], columns: Columns, skip: Skip | None = None) -> Iterator[Row]:
    """The documents of some files.

    Args:
        skip: told of everything that is left out: the file's name, the number of the row (None for all that is left of
            the file), and why.
    """
    skip = skip or (lambda *_: None)
    for file in files:
        if not file.size:
            skip(file.name, None, "empty file")
            continue
        reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}[file.kind]
        yield from reader(file, columns, skip)


def _opened(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _read_jsonl(file: InputFile, columns: Columns, skip: Skip) -> Iterator[Row]:
    number = 0
    try:
        with _opened(file.path) as stream:
            while line := stream.readline(MAX_DOCUMENT_BYTES):
                number += 1
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                    skip(file.name, number, f"line of more than {MAX_DOCUMENT_BYTES >> 20} MiB")
                    continue
                if not line.strip():
                    continue
                try:
                    values = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    skip(file.name, number, "not UTF-8")
                except (ValueError, RecursionError):
                    skip(file.name, number, "not JSON")
                else:
                    yield from _row(values, file, number, columns, skip)
    except (EOFError, OSError, zlib.error) as error:
        skip(file.name, None, f"broken behind row {number:,}: {_reason(error)}")


def _read_parquet(file: InputFile, columns: Columns, skip: Skip) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path) as table:
            if columns.text not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                return skip(file.name, None, f"no column {columns.text!r}: it has {names}")
            for batch in table.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    yield from _row(values, file, number, columns, skip)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        skip(file.name, None, f"broken behind row {number:,}: {_reason(error)}")


def _read_text(file: InputFile, columns: Columns, skip: Skip) -> Iterator[Row]:
    if file.size > MAX_DOCUMENT_BYTES:
        return skip(file.name, None, f"file of more than {MAX_DOCUMENT_BYTES >> 20} MiB")
    try:
        data = Path(file.path).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return skip(file.name, None, "not UTF-8")
    except OSError as error:
        return skip(file.name, None, _reason(error))
    if "\0" in text:
        return skip(file.name, None, "not text: it has NUL bytes")
    yield Row(text, file.name, {"file": file.name})


def _row(values: Any, file: InputFile, number: int, columns: Columns, skip: Skip) -> Iterator[Row]:
    if not isinstance(values, dict):
        return skip(file.name, number, "no object with columns")
    if columns.text not in values:
        return skip(file.name, number, f"no column {columns.text!r}")
    text = values.pop(columns.text)
    if not isinstance(text, str):
        return skip(file.name, number, f"the column {columns.text!r} holds {type(text).__name__}")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return skip(file.name, number, "not UTF-8")
    if size > MAX_DOCUMENT_BYTES:
        return skip(file.name, number, f"document of more than {MAX_DOCUMENT_BYTES >> 20} MiB")
    name = values.pop("id", None)
    yield Row(text, str(name) if name is not None else f"{file.name}#{number}", {"file": file.name, **values})


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def domain_of(row: Row, columns: Columns, known: Sequence[str]) -> str | None:
    """The domain that a document's column says, or one of its folders if that is among `known`."""
    said = row.metadata.get(columns.domain)
    if isinstance(said, str) and said:
        return said
    folders = row.metadata["file"].split("/")[:-1]
    return next((folder for folder in folders if folder in known), None)
