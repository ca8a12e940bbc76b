"""What lies in the folder of a checkpoint or an adapter, for whoever asks: identities, records, cards, uploads."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ..models.dsv3.checkpoint_files_dsv3 import (
    CheckpointError,
    CheckpointFiles,
    StoredTensor,
    read_checkpoint,
    resolve_checkpoint,
)
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config


CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_OF_GGUF = (
    "this reads safetensors. Load it by `from_pretrained(folder, gguf_file=...)` and save the model and its tokenizer "
    "with `save_pretrained`; `explain` and `routing` open it as it is"
)


class CheckpointFolder:
    """A checkpoint or a PEFT adapter on disk. Each of its files is read once, weights by their headers alone.

    Attributes:
        is_adapter: whether the adapter is meant.
        config_path: config.json, of an adapter adapter_config.json.
        fields: of that file.
    """

    def __init__(self, path: str | Path, adapter: bool | None = None):
        """Reads the configuration, and nothing else.

        Args:
            adapter: of a folder that holds both, whether the adapter is meant. It is where this is not given, as
                Transformers decides it.

        Raises:
            CheckpointError: naming the folder or file, where there is none or it cannot be read.
        """
        self.path = Path(path)
        self.is_adapter = (self.path / ADAPTER_CONFIG).is_file() if adapter is None else adapter
        self.config_path = self.path / (ADAPTER_CONFIG if self.is_adapter else CONFIG)
        if self.path.suffix == ".gguf" and self.path.is_file():
            raise CheckpointError(f"{self.path} is a GGUF file: {_OF_GGUF}")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder")
        if not self.config_path.is_file() and (found := sorted(self.path.glob("*.gguf"))):
            raise CheckpointError(f"{self.path} holds a GGUF file alone, {found[0].name}: {_OF_GGUF}")
        if not self.config_path.is_file():
            raise CheckpointError(
                f"{self.path} is no checkpoint: it has neither {CONFIG} nor {ADAPTER_CONFIG}. Save the model there "
                "with `save_pretrained`"
            )
        try:
            self.fields: dict[str, Any] = json.loads(self.config_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{self.config_path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{self.config_path} is not a configuration in JSON ({error})") from error
        if not isinstance(self.fields, dict):
            raise CheckpointError(f"{self.config_path} is not a configuration in JSON (it is no object)")

    @cached_property
    def weights(self) -> CheckpointFiles | None:
        """The safetensors files that Transformers loads; None where there are none.

        Raises:
            CheckpointError: there are only pickled ones, or the index is broken.
        """
        if not self.is_adapter:
            return resolve_checkpoint(str(self.path), explicit_filename=self.fields.get("transformers_weights"))
        path = self.path / ADAPTER_WEIGHTS
        return CheckpointFiles([str(path)]) if path.is_file() else None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All of `weights`, by name.

        Raises:
            CheckpointError: there are none, or a file is missing or broken.
        """
        if self.weights is None and self.is_adapter:
            raise CheckpointError(f"{self.path} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
        if self.weights is None:
            raise CheckpointError(
                f"{self.path} is no checkpoint: it has neither model.safetensors nor model.safetensors.index.json"
            )
        return read_checkpoint(self.weights.files, self.weights.index)

    def model_config(self) -> DeepseekV3Config:
        """The model's configuration, a new one each time. Raises `CheckpointError` where it is refused."""
        return model_config(str(self.config_path), self.fields)


def model_config(source: str, fields: dict[str, Any]) -> DeepseekV3Config:
    """The configuration in the fields of a config.json. `source` names the file in a `CheckpointError`."""
    try:
        return DeepseekV3Config.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: the configuration is refused: {error}") from error
