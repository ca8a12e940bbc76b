"""Which names on a command line are files and folders, and which are names on the Hub.

Asked for a path that does not exist, the Hub's clients answer that it is no valid name of a repository, or ask the
network for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


# The builder of `datasets` that reads a file of this ending
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}


def looks_like_path(name: str) -> bool:
    """Whether a name can be nothing but a path. Names on the Hub have one slash at most; URLs are neither."""
    if "://" in name:
        return False
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or Path(name).suffix in BUILDERS


def load_refusal(checkpoint: str, error: Exception) -> str:
    """One line that names a checkpoint and says why loading it ended in `error`."""
    # Of a path that does not exist, Transformers says that it is no valid name of a repository
    if not Path(checkpoint).exists() and looks_like_path(checkpoint):
        return f"{checkpoint}: no such folder"
    return f"{checkpoint}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"


def local_or_hub(name: str, one_of: Sequence[str] = ()) -> str:
    """The name as `from_pretrained` and `load_dataset` take it, with `~` written out.

    Args:
        one_of: patterns of which a local folder has to hold a file.

    Raises:
        ValueError: it is a path, and nothing is there, or none of these files is.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if looks_like_path(name):
            raise ValueError(f"{name}: no such file or folder")
        return name
    if path.is_dir() and one_of and not any(found for pattern in one_of for found in path.glob(pattern)):
        raise ValueError(f"no {' or '.join(one_of)} in {name}")
    return str(path) if name.startswith("~") else name
