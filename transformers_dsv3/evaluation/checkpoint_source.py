"""Where a checkpoint or adapter is: a folder, or a repository on the Hub of which first only the small files come.

What is wrong with a configuration or a tokenizer so shows before gigabytes are downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import transformers_dsv3  # noqa: F401  registers the plugin's classes with the Auto classes

from ..data.local_paths import local_or_hub
from .checkpoint_folder import ADAPTER_CONFIG, CheckpointFolder
from .checkpoint_identity import CheckpointIdentity, checkpoint_identity


_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]


@dataclass
class CheckpointSource:
    """A checkpoint, or an adapter with the checkpoint under it.

    Attributes:
        name: as it was given: what a person calls it, perhaps a path.
        folder: its files on this machine; of a repository, the weights come by `fetch`.
        revision: commit of the repository; None for a folder.
        base: of an adapter.
    """

    name: str
    folder: Path
    revision: str | None = None
    base: CheckpointSource | None = None

    @property
    def model_folder(self) -> Path:
        """The folder whose config.json the model has."""
        return self.folder if self.base is None else self.base.folder

    def fetch(self) -> None:
        """Download the weights where they are on the Hub."""
        if self.base is not None:
            self.base.fetch()
        if self.revision is not None:
            snapshot_download(self.name, revision=self.revision, allow_patterns=_WEIGHT_FILES, ignore_patterns=["*/*"])

    def identity(self) -> CheckpointIdentity:
        """Name and digests, of the base too; reads all weights."""
        base = None if self.base is None else self.base.identity()
        name = self.name if self.revision is not None else None
        return checkpoint_identity(self.folder, name=name, revision=self.revision, base=base)

    def load_config(self) -> Any:
        """The config of the text, which is what is measured of a model that reads pictures too."""
        return AutoConfig.from_pretrained(self.model_folder).get_text_config()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        own = (self.folder / "tokenizer_config.json").is_file()
        return AutoTokenizer.from_pretrained(self.folder if own else self.model_folder)

    def load_model(self, dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
        """The model, with the adapter's layers put into it.

        Raises:
            ValueError: an adapter that is a prompt and not layers, beside what `from_pretrained` raises.
        """
        model = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=dtype, device_map=device)
        if self.base is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, str(self.folder))
            if adapted.active_peft_config.is_prompt_learning:
                kind = adapted.active_peft_config.peft_type.value
                raise ValueError(f"{self.name} is an adapter of kind {kind}, which is no part of a model's layers")
            model = adapted.get_base_model()
        return model.eval()


def find_checkpoint(name: str, revision: str | None = None, base_model: str | None = None) -> CheckpointSource:
    """Find a checkpoint or a PEFT adapter, and the small files of one on the Hub.

    Args:
        revision: branch, tag or commit of a repository on the Hub.
        base_model: checkpoint under an adapter; the one that the adapter names where not given.

    Raises:
        ValueError: `name` is a path where nothing is, a revision of a folder or a base model of what is no adapter was
            asked for, or the adapter names no base model (`CheckpointError` where a folder is no checkpoint).
        OSError: what the Hub's client says of a repository that it cannot reach.
    """
    name = local_or_hub(name)
    commit = None
    if Path(name).exists():
        if revision is not None:
            raise ValueError(f"{name} is a folder here, which has no revision {revision!r}")
        folder = Path(name)
    else:
        # No weights of subfolders: some repositories keep the same ones there in another form
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"]))
        commit = folder.name
    described = CheckpointFolder(folder)
    if not described.is_adapter:
        if base_model is not None:
            raise ValueError(f"{name} is a whole checkpoint, not an adapter with a base model")
        return CheckpointSource(name, folder, commit)
    if base_model is not None:
        return CheckpointSource(name, folder, commit, find_checkpoint(base_model))
    named = described.fields.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{name}/{ADAPTER_CONFIG} names no base model: give --base-model")
    try:
        return CheckpointSource(name, folder, commit, find_checkpoint(named, described.fields.get("revision")))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"base model of {name}: {reason}; --base-model says where it is now") from error
