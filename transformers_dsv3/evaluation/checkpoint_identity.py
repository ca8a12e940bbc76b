"""Which checkpoint a figure belongs to: a digest of what its files hold, however they are cut or named.

A result travels without the weights, and names can be given twice. The digest is over the contents: every tensor's
name, dtype, shape and bytes, and the configuration. Sharding, the order of tensors in a file, and the version of
Transformers that wrote them do not change it; one changed weight does.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict, validated_field
from tqdm.auto import tqdm

from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor
from .checkpoint_folder import CheckpointFolder
from .machine import usable_cores


# What writers of a configuration put in that changes no output: where it came from, who wrote it, whose code loads it.
# An adapter's base model is a checkpoint of its own, with its own digest.
_INCIDENTAL = frozenset(
    {"_name_or_path", "auto_map", "base_model_name_or_path", "peft_version", "revision", "transformers_version"}
)
# Sets in PEFT, which come out in another order each time
_SETS = frozenset({"target_modules", "exclude_modules", "target_parameters", "modules_to_save"})
_CHUNK_BYTES = 1 << 22


def _check_sha256(value: str) -> None:
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("not 64 hexadecimal digits")


@strict
@dataclass
class CheckpointIdentity:
    """A checkpoint by name and contents.

    Attributes:
        name: the folder's own name, or the repository's on the Hub; never a path.
        sha256: see `checkpoint_digest`.
        config_sha256: see `config_digest`; all there is to compare with where a folder has no weights.
        revision: commit of the repository on the Hub; None for a folder.
        base: of an adapter, the model that it was put on.
    """

    name: str
    sha256: str = validated_field(_check_sha256)
    config_sha256: str = validated_field(_check_sha256)
    revision: str | None = None
    base: "CheckpointIdentity | None" = None


def checkpoint_identity(
    folder: str | Path | CheckpointFolder,
    *,
    name: str | None = None,
    revision: str | None = None,
    base: CheckpointIdentity | None = None,
) -> CheckpointIdentity:
    """Name and digests of a folder.

    Args:
        name: what to call it; the folder's own name where not given.

    Raises:
        CheckpointError: see `checkpoint_digest`.
    """
    folder = _described(folder)
    name = folder.path.resolve().name if name is None else name
    return CheckpointIdentity(name, checkpoint_digest(folder), config_digest(folder), revision, base)


def checkpoint_digest(folder: str | Path | CheckpointFolder) -> str:
    """sha256, in hex, over the contents of a checkpoint or a PEFT adapter: configuration and safetensors files.

    Of several safetensors files, those count that Transformers loads. Reads every weight once.

    Raises:
        CheckpointError: naming the folder or file, where it is no checkpoint or a file is broken.
    """
    folder = _described(folder)
    digest = hashlib.sha256(config_digest(folder).encode())
    tensors = folder.tensors
    total = sum(tensor.nbytes for tensor in tensors.values())
    name = folder.path.resolve().name
    with (
        tqdm(total=total, desc=f"digest of {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        ordered = [tensors[name] for name in sorted(tensors)]
        for tensor, content in zip(ordered, pool.map(_tensor_digest, ordered)):
            described = json.dumps([tensor.name, tensor.dtype_name, tensor.shape, content])
            digest.update(described.encode() + b"\n")
            bar.update(tensor.nbytes)
    return digest.hexdigest()


def config_digest(folder: str | Path | CheckpointFolder) -> str:
    """sha256, in hex, over the fields of config.json (adapter_config.json of an adapter) that say how the model works.

    Raises:
        CheckpointError: naming the folder or file, where there is none or it cannot be read.
    """
    fields = _described(folder).fields
    counted = {key: _ordered(key, value) for key, value in fields.items() if key not in _INCIDENTAL}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _described(folder: str | Path | CheckpointFolder) -> CheckpointFolder:
    return folder if isinstance(folder, CheckpointFolder) else CheckpointFolder(folder)


def _ordered(key: str, value: Any) -> Any:
    return sorted(value) if key in _SETS and isinstance(value, list) else value


def _tensor_digest(tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.nbytes
    buffer = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset, os.SEEK_SET)
        while left:
            count = file.readinto(buffer[: min(left, _CHUNK_BYTES)])
            if not count:
                raise CheckpointError(f"{tensor.path}: the file ended while reading tensor '{tensor.name}'")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
