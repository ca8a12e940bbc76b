"""Room on a disk for routed experts that memory does not hold: mapped files, of which the system keeps what is used.

Checkpoints hold weights in other orders than the kernels take, so the files are the loaded model's own. They have no
names from the moment they are made, and are gone when the model is, or its process.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from ..memory import free_memory
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError


logger = logging.get_logger(__name__)

# Share of the memory that is free which a model may take in whole
_SHARE = 0.9


class DiskRoom:
    """Memory for tensors that lies in files of a folder.

    Args:
        folder: on a disk; where that is memory itself (tmpfs), nothing is gained.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros that is mapped from a file of its own. Its room on the disk is taken at once.

        Raises:
            OSError: the disk is full.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return torch.empty(tuple(shape), dtype=dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # Without it, writing to a page for which the full disk has no room ends the process
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))


def disk_room(n_bytes: int, of_experts: int, wanted: bool | str | os.PathLike | None) -> DiskRoom | None:
    """Where a model's routed experts go: None for memory.

    Args:
        n_bytes: of all weights, once they are loaded. of_experts: of routed experts among them.
        wanted: a folder, or whether it is to be done, in `TMPDIR` or `/var/tmp`; None where memory is too short.

    Raises:
        CheckpointError: the folder is not there or has too little room.
    """
    if wanted is False or not of_experts or not hasattr(os, "posix_fallocate"):
        return None
    free = free_memory()
    if wanted is None and n_bytes <= _SHARE * free:
        return None
    folder = Path(wanted) if isinstance(wanted, (str, os.PathLike)) else _folder()
    if not folder.is_dir():
        raise CheckpointError(f"map_from_disk: there is no folder {folder}")
    there = shutil.disk_usage(folder).free
    if of_experts > there:
        reason = "" if wanted is not None else f"the weights take {_gib(n_bytes)}, memory has {_gib(free)}, and "
        raise CheckpointError(
            f"{reason}routed experts take {_gib(of_experts)} on a disk; {folder} has {_gib(there)}: give another by "
            "`PackedWeightsConfig(map_from_disk=FOLDER)` or TMPDIR"
        )
    if wanted is None:
        logger.warning(
            f"The weights take {_gib(n_bytes)} and memory has {_gib(free)}: {_gib(of_experts)} of routed experts are "
            f"mapped from a file in {folder}, and read from there where memory does not keep them. "
            "`PackedWeightsConfig(map_from_disk=False)` loads them all the same."
        )
    return DiskRoom(folder)


def _folder() -> Path:
    asked = os.environ.get("TMPDIR")
    return Path(asked) if asked else next((p for p in [Path("/var/tmp")] if p.is_dir()), Path(tempfile.gettempdir()))


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
