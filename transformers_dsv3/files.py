"""Files that are there as a whole or not at all, and folders that cannot take any. The standard library only."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def write_refusal(folder: Path) -> str | None:
    """Why no file can be made in a folder that is there, in one line; None where one can.

    Tried, since permissions do not tell all.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written in {folder}: {error.strerror}"


def file_refusal(path: Path) -> str | None:
    """Why no file can be written at a path, in one line; None where one can."""
    folder = path.absolute().parent
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if path.exists() and not path.is_file():
        return f"{path} is a device or a pipe, which a file would take the place of"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return write_refusal(folder)


def partial_path(path: Path) -> Path:
    """Where a file is written before it takes its name: all that a killed process leaves of it."""
    return path.with_name(path.name + ".partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a file that is whole its name, once what it holds is on the disk: a loss of power leaves one or the other.

    Args:
        partial: where it was written, on the same file system.
    """
    settle(partial)
    partial.replace(path)
    settle(path.parent)


def settle(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk itself."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError:
        if is_folder:
            return  # Windows opens none
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Where that fails, the old one stays and nothing else is left.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def json_bytes(value: Any, *, indent: int = 2, rows: bool = False) -> bytes:
    """A value as a JSON file that people read too.

    Args:
        rows: put each list of numbers on one line.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if rows:
        # A line break stands in no string, so that no text in brackets is taken for a list
        text = re.sub(r"\[\n[-+.eE\d\s,]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)
    # What is no character, as in a file's name that is not UTF-8, becomes JSON's own escape
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any, *, indent: int = 2, rows: bool = False) -> None:
    """Write a JSON file as [`write_whole`] does."""
    write_whole(path, json_bytes(value, indent=indent, rows=rows))


def update_json(path: str | Path, entries: dict[str, Any]) -> None:
    """Put entries into the object that a JSON file holds, in place of those of the same names.

    Where there is no file yet, it is made, and its folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**before, **entries})
