"""Putting a checkpoint in place whole, whoever else saves to the same folder.

Each save writes to a hidden folder of its own inside the target, under a lock that ends with the process, and moves
its files when all are there, one save at a time. Locks are the system's own (`flock` on the folders themselves), so a
process that is killed leaves none behind. Where there are none (Windows, some network file systems) nothing fails, but
saves of different models at the same moment may mix.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGING_PREFIX = ".saving-"
# Age at which a folder goes that no lock tells to be in use, in seconds: no save takes as long
_ABANDONED = 7 * 24 * 3600


@contextlib.contextmanager
def staging(target: str) -> Iterator[str]:
    """A new hidden folder inside `target`, removed with what is left in it. Those of killed saves are removed too."""
    for name in os.listdir(target):
        if name.startswith(STAGING_PREFIX):
            _remove_abandoned(os.path.join(target, name))
    while True:
        folder = tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target)
        lock = lock_folder(folder, wait=False)
        if lock is not None and os.path.isdir(folder):
            break
        # Another save took it for abandoned before it was locked
        unlock_folder(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock_folder(lock)


def _remove_abandoned(folder: str) -> None:
    """Remove the folder of a save that was killed: nobody holds its lock, or it is old where there are no locks."""
    lock = lock_folder(folder, wait=False)
    if lock is None:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            if lock >= 0 or time.time() - os.stat(folder).st_mtime > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        unlock_folder(lock)


def lock_folder(folder: str, wait: bool) -> int | None:
    """Lock a folder against other saves, in this process too.

    Returns:
        A descriptor that holds the lock; -1 where the system has no such locks; None where another save holds it, or
        the folder is gone.
    """
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return -1
    return descriptor


def unlock_folder(lock: int | None) -> None:
    if lock is not None and lock >= 0:
        os.close(lock)


def publish(folder: str, target: str, variant: str | None) -> None:
    """Move a complete checkpoint from `folder` to `target`, on the same file system, one save at a time.

    Between the first and the last step the target has no entry point to weights, so it cannot be mistaken for a whole
    checkpoint; a single file is replaced in one step.
    """
    suffix = re.escape(f".{variant}") if variant else ""
    single = re.compile(rf"model{suffix}\.safetensors")
    index = re.compile(rf"model\.safetensors\.index{suffix}\.json")
    shard = re.compile(rf"model{suffix}-\d{{5}}-of-\d{{5}}\.safetensors")
    new = set(os.listdir(folder))
    entry_points = sorted(name for name in new if single.fullmatch(name) or index.fullmatch(name))
    lock = lock_folder(target, wait=True)
    try:
        old = os.listdir(target) if entry_points else []  # adapters are saved beside the weights they belong to
        for name in old:
            if index.fullmatch(name) or (single.fullmatch(name) and name not in new):
                _remove(os.path.join(target, name))
        for name in [*sorted(new.difference(entry_points)), *entry_points]:
            os.replace(os.path.join(folder, name), os.path.join(target, name))
        for name in old:
            if shard.fullmatch(name) and name not in new:
                _remove(os.path.join(target, name))
    finally:
        unlock_folder(lock)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # by another save, where there are no locks
        os.remove(path)
