"""Parquet files of kept and dropped documents, which have their names when they are whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


ROWS, BYTES = 2_000, 16 << 20  # of a row group, whichever comes first
_COMMON = {
    "text": "string",
    "id": "string",
    "file": "string",
    "domain": "string",
    "language": "string",
    "tokens": "int64",
    "bytes": "int64",
    "ngram_bits_per_byte": "double",
    "model_bits_per_byte": "double",
    "shard": "int32",
    "place": "int32",
    "metadata": "string",
}
KEPT = _COMMON
DROPPED = {**_COMMON, "stage": "string", "reason": "string", "detail": "string"}


def kept_pattern(domain: str) -> str:
    """The files of a domain, relative to the output folder."""
    return f"kept/{_file_name(domain)}-*.parquet"


def _file_name(domain: str) -> str:
    return re.sub(r"[^\w.]+", "_", domain).strip("_.") or "text"


class _File:
    def __init__(self, path: Path, columns: dict[str, str]):
        import pyarrow

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.schema = pyarrow.schema(
            [(name, getattr(pyarrow, kind if kind != "double" else "float64")()) for name, kind in columns.items()]
        )
        self.writer: Any = None
        self.rows: list[dict[str, Any]] = []
        self.size = 0

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.size += row["bytes"]
        if len(self.rows) >= ROWS or self.size >= BYTES:
            self.flush()

    def flush(self) -> None:
        import pyarrow
        import pyarrow.parquet as pq

        if self.writer is None:
            self.writer = pq.ParquetWriter(self.partial, self.schema, compression="zstd")
        if self.rows:
            self.writer.write_table(pyarrow.Table.from_pylist(self.rows, schema=self.schema))
        self.rows, self.size = [], 0

    def close(self) -> None:
        self.flush()
        self.writer.close()


class ShardWriter:
    """The files of one shard. Left with an exception, none of them is there; otherwise each is, whole."""

    def __init__(self, output: Path, shard: int):
        self.output, self.shard = output, shard
        self.kept: dict[str, _File] = {}
        self.dropped = _File(output / "dropped" / f"{shard:05d}.parquet", DROPPED)

    def keep(self, row: dict[str, Any]) -> None:
        name = _file_name(row["domain"])
        if name not in self.kept:
            self.kept[name] = _File(self.output / "kept" / f"{name}-{self.shard:05d}.parquet", KEPT)
        self.kept[name].write(row)

    def drop(self, row: dict[str, Any]) -> None:
        self.dropped.write(row)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        files = [*self.kept.values(), self.dropped]
        if kind is not None:
            for file in files:
                if file.writer is not None:
                    file.writer.close()
                file.partial.unlink(missing_ok=True)
            return
        for file in files:
            file.close()
        for file in files:
            file.partial.replace(file.path)
