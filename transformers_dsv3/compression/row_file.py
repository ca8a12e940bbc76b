"""Activations on disk: rows of fp32, of which only those that are asked for are in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class RowFile:
    """A matrix `(n_rows, width)` of fp32 in a file without a header.

    The file is mapped for the time of one call only: pages of a mapping that stays count as the program's memory.
    """

    def __init__(self, path: Path, n_rows: int, width: int):
        self.path = path
        self.shape = (n_rows, width)

    def create(self) -> RowFile:
        """Makes the file, full of zeros, in place of one that is there."""
        with open(self.path, "wb") as file:
            file.truncate(4 * self.shape[0] * self.shape[1])
        return self

    def _mapped(self, mode: str) -> np.memmap:
        return np.memmap(self.path, np.float32, mode, shape=self.shape)  # type: ignore[call-overload,no-any-return]

    def read(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """A copy of some rows, `(n, width)`; a tensor is int64 numbers of rows."""
        mapped = self._mapped("r")
        # Memory of PyTorch, whose alignment libraries need for sums in the same order each time
        if isinstance(rows, slice):
            out = torch.empty(len(range(*rows.indices(self.shape[0]))), self.shape[1])
            out.numpy()[:] = mapped[rows]
        else:
            out = torch.empty(len(rows), self.shape[1])
            np.take(mapped, rows.numpy(), axis=0, out=out.numpy())
        return out

    def write(self, rows: slice, values: torch.Tensor) -> None:
        self._mapped("r+")[rows] = values.numpy()

    def add(self, rows: slice | torch.Tensor, values: torch.Tensor) -> None:
        """Adds to some rows, each named once at most."""
        mapped = self._mapped("r+")
        index = rows if isinstance(rows, slice) else rows.numpy()
        mapped[index] += values.numpy()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
