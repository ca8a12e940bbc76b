"""Which names on a command line are files and folders, and which are names on the Hub.

Asked for a path that does not exist, the Hub's clients answer that it is no valid name of a repository, or ask the
network for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..models.dsv3.checkpoint_dsv3 import READERS
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError


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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # What is wrong with a checkpoint is listed below; the first of it names the tensor
    told = lines[:2] if isinstance(error, CheckpointError) else lines[:1]
    return f"{checkpoint}: {' '.join(line.strip() for line in told)}"


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


def model_arguments(checkpoint: str) -> dict[str, str]:
    """What `from_pretrained` is to be called with for a checkpoint, its model, config and tokenizer alike.

    Args:
        checkpoint: a folder, a name on the Hub, or a GGUF file. Of a folder that holds no config.json but a GGUF file,
            that one is meant.

    Raises:
        ValueError: the folder has several, or the file is none, truncated, or one part of several.
    """
    path = Path(checkpoint).expanduser()
    found = [path] if path.suffix == ".gguf" and path.is_file() else []
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
    if not found:
        return {"pretrained_model_name_or_path": checkpoint}
    # Of a model in several files the first stands for all
    whole = [file for file in found if not re.search(r"-\d{5}-of-\d{5}$", file.stem)]
    whole += [file for file in found if re.search(r"-00001-of-\d{5}$", file.stem)]
    if len(whole) > 1:
        names = ", ".join(file.name for file in whole)
        raise ValueError(f"{checkpoint} holds several GGUF files ({names}): name one, as in {whole[0]}")
    file = (whole or found)[0]
    # What is wrong with it, of which Transformers would say less
    READERS["gguf"](str(file), lambda name: str(file.with_name(name)), None)
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
