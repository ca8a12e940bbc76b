"""What of a folder on disk makes a model repository, and whether it is whole.

Everything here is local: nothing is asked of the Hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

from ..evaluation.checkpoint_folder import ADAPTER_CONFIG, CONFIG, CheckpointFolder
from ..evaluation.shareable import holds_token
from ..models import dsv3
from ..models.dsv3.checkpoint_checks_dsv3 import mtp_layers_present
from ..models.dsv3.checkpoint_dsv3 import fit_problems
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError


CARD = "README.md"
# Formats in which a file can run code when it is read
PICKLED = tuple(f"*.{suffix}" for suffix in "bin pt pth pkl pickle ckpt joblib npy npz h5 msgpack".split())
# What training frameworks and this package's scripts keep to go on; their arguments can name folders of the machine
_RUN_STATE = (
    "trainer_state.json",
    "run.json",
    "before.json",
    "before_results.json",
    "checkpoint-*/*",
    "runs/*",
    "events.out.tfevents.*",
    "*.log",
)
_PUBLISHED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "figures/*.png",
    "figures/*.svg",
)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class ModelFolder:
    """A checkpoint, or a PEFT adapter, as it will be in its repository.

    Attributes:
        path: the folder.
        files: path in the repository to size in bytes.
        replaced: contents of files that will differ from those on disk, by path in the repository.
        left_out: path in the folder to the reason why it stays behind.
        is_adapter: whether these are the weights of an adapter alone.
        remarks: what is allowed but likely to be missed, a sentence each.
    """

    path: Path
    files: dict[str, int]
    left_out: dict[str, str]
    is_adapter: bool
    remarks: list[str] = field(default_factory=list)
    replaced: dict[str, bytes] = field(default_factory=dict)

    def content(self, name: str) -> bytes:
        """A small file as it will be in the repository."""
        return self.replaced[name] if name in self.replaced else (self.path / name).read_bytes()

    def read_json(self, name: str) -> Any:
        return json.loads(self.content(name))

    def require_model(self, option: str) -> None:
        if self.is_adapter:
            raise CheckpointError(f"{option} goes with a model, and {self.path} is an adapter")

    def write_json(self, name: str, data: Any) -> None:
        """Changes a file of the repository, not the one on disk."""
        self.replaced[name] = (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
        self.files[name] = len(self.replaced[name])


def read_model_folder(path: str | Path, token: str | None = None) -> ModelFolder:
    """Reads a folder for publishing and checks it.

    Weights have to be safetensors, complete by their index and their own headers, and fit `config.json`. JSON files
    have to be whole, and no text may hold an access token.

    Args:
        path: a folder that `save_pretrained` wrote: a model, with its tokenizer and card or without, or an adapter.
        token: an access token that must not be among what is published, besides those that are known by their form.

    Raises:
        CheckpointError: the folder is no checkpoint, or a broken one. The message names files and tensors.
    """
    path = Path(path).expanduser()
    # An adapter beside a model goes with it
    described = CheckpointFolder(path, adapter=False if (path / CONFIG).is_file() else None)
    folder = ModelFolder(path, {}, {}, described.is_adapter)
    _sort_files(folder)
    for name in folder.files:
        if name.endswith(".json"):
            _check_json(path / name)
    weights = _check_weights(folder, described)
    if ADAPTER_CONFIG in folder.files and not described.is_adapter:
        weights |= _check_weights(folder, CheckpointFolder(path, adapter=True))
    for name in [name for name in folder.files if name.endswith(".safetensors") and name not in weights]:
        folder.left_out[name] = "weights that belong to no index or config here"
        del folder.files[name]
    for name, size in folder.files.items():
        if size > MAX_HTTP_DOWNLOAD_SIZE:
            raise CheckpointError(
                f"{path / name} has {size / 1e9:.0f} GB, and of more than {MAX_HTTP_DOWNLOAD_SIZE / 1e9:.0f} GB not "
                "everybody can download a file. Save with `save_pretrained(..., max_shard_size='5GB')`"
            )
    _check_secrets(folder, token)
    if CARD not in folder.files:
        folder.remarks.append(f"there is no model card ({CARD}): `transformers-dsv3 card {path}` writes one")
    if not folder.is_adapter and not any(name in folder.files for name in _TOKENIZER):
        folder.remarks.append("there is no tokenizer: `pipeline` and chat will not work with this repository alone")
    return folder


def _sort_files(folder: ModelFolder) -> None:
    for file in sorted(folder.path.rglob("*")):
        name = file.relative_to(folder.path).as_posix()
        # Of the many files of a run's checkpoints one line is enough
        top = name.split("/")[0]
        if not file.is_file():
            continue
        if any(part.startswith(".") for part in name.split("/")):
            folder.left_out[top if top.startswith(".") else name] = "hidden"
        elif any(fnmatch(name, pattern) for pattern in _RUN_STATE):
            folder.left_out[f"{top}/" if "/" in name else name] = "state of a training run"
        elif any(fnmatch(name, pattern) for pattern in PICKLED):
            folder.left_out[name] = "a format that can run code when it is read"
        elif any(fnmatch(name, pattern) and pattern.count("/") == name.count("/") for pattern in _PUBLISHED):
            folder.files[name] = file.stat().st_size
        else:
            folder.left_out[f"{top}/" if "/" in name else name] = "no file of a model repository"


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no whole JSON file: {error}") from None


def _check_weights(folder: ModelFolder, described: CheckpointFolder) -> set[str]:
    """Names of the files that hold the weights. Raises `CheckpointError` where they are broken or do not fit."""
    if described.weights is None and not described.is_adapter:
        raise CheckpointError(f"{folder.path} has {CONFIG} but no model.safetensors, nor an index of shards")
    names = {Path(tensor.path).relative_to(folder.path).as_posix() for tensor in described.tensors.values()}
    if not described.is_adapter and described.fields.get("model_type") == "deepseek_v3":
        _check_fit(folder, described)
    return names


def _check_fit(folder: ModelFolder, described: CheckpointFolder) -> None:
    fields, stored, config = described.fields, described.tensors, described.model_config()
    announced = config.num_nextn_predict_layers or 0
    present = mtp_layers_present(list(stored), config.num_hidden_layers, announced)
    if present < announced:
        config.num_nextn_predict_layers = present
        folder.remarks.append(
            f"{CONFIG} announces {announced} MTP layer(s), and the files hold {present}: servers that use MTP will "
            "not load it. Load and save it once with this package, which sets the number right"
        )
    model_class = getattr(dsv3, (config.architectures or ["DeepseekV3ForCausalLM"])[0], None)
    quantization = fields.get("quantization_config") or {}
    block_size = quantization.get("weight_block_size") if quantization.get("quant_method") == "fp8" else None
    if model_class is None or (quantization and not block_size):
        return  # a class or a format of somebody else's: its files are whole, which is all that is known here
    with torch.device("meta"):
        problems = fit_problems(model_class(config), stored, block_size=block_size)
    if problems:
        raise CheckpointError(
            f"the weights in {folder.path} do not fit its {CONFIG}:\n  " + "\n  ".join(problems[:20])
        )


def _check_secrets(folder: ModelFolder, token: str | None) -> None:
    for name in folder.files:
        if name.endswith(".safetensors") or name.startswith("figures/"):
            continue
        content = (folder.path / name).read_bytes()
        if holds_token(content) or (token and token.encode() in content):
            raise CheckpointError(f"{folder.path / name} holds an access token of the Hub. Take it out, and revoke it")


def set_base_model(folder: ModelFolder, base_model: str | None) -> None:
    """Makes the adapter's config, and its card, name its base model as others can find it.

    Raises:
        CheckpointError: it names a folder of this machine, or nothing, and `base_model` is not given; or `base_model`
            is given for what is no adapter.
    """
    if ADAPTER_CONFIG not in folder.files:
        if base_model is not None:
            raise CheckpointError(f"{folder.path} is no adapter, for which a base model could be named")
        return
    fields = folder.read_json(ADAPTER_CONFIG)
    if base_model is not None:
        folder.write_json(ADAPTER_CONFIG, {**fields, "base_model_name_or_path": base_model})
        _set_base_model_of_card(folder, base_model)
        return
    stored = fields.get("base_model_name_or_path") or ""
    if not REPO_ID.fullmatch(stored) or Path(stored).exists():
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG}: base_model_name_or_path is {stored!r}, which nobody else has. Push the "
            "base model too, and give its name on the Hub (--base-model, base_model=)"
        )


def _set_base_model_of_card(folder: ModelFolder, base_model: str) -> None:
    """PEFT writes the folder into the card's metadata, or nothing, and the Hub refuses both."""
    content = folder.content(CARD).decode("utf-8", errors="replace") if CARD in folder.files else ""
    if not content.startswith("---"):
        return
    try:
        card = ModelCard(content)
    except (ValueError, yaml.YAMLError):
        return  # the Hub will say what is wrong with it
    named = card.data.base_model
    if named is not None and not (isinstance(named, list) or REPO_ID.fullmatch(named)):
        card.data.base_model = base_model
        folder.replaced[CARD] = str(card).encode()
        folder.files[CARD] = len(folder.replaced[CARD])
