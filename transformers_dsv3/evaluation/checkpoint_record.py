"""What a checkpoint's own files tell of it, kept for where the weights are not: `checkpoint_record.json`.

{
  "record": "transformers-dsv3 checkpoint", "version": 1,
  "checkpoint": {"name", "sha256", "config_sha256", "revision", "base"},   as in evaluation records
  "files": 1, "bytes": 20561640,
  "stored_as": {"F32": 5140410},       values by dtype, as safetensors names them
  "parameters": null, or {"main", "active", "mtp"}:   see [`ParameterCounts`]; null where files hold packed codes
  "tokenizer": null, or {"class", "entries", "chat_template"},
  "base": null, or of an adapter's model {"name", "config", "parameters"}, as far as it is at hand
}
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoTokenizer

from ..models.dsv3.checkpoint_checks_dsv3 import SCALE
from ..models.dsv3.checkpoint_files_dsv3 import StoredTensor
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from ..models.dsv3.mtp_dsv3 import COPIES
from .checkpoint_folder import CONFIG, CheckpointFolder
from .checkpoint_identity import CheckpointIdentity, checkpoint_identity
from .record_fields import check_kind, plain, read_fields, read_values
from .shareable import shareable


CHECKPOINT_RECORD = "checkpoint_record.json"
RECORD, VERSION = "transformers-dsv3 checkpoint", 1

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# In the files beside the parameters: scales of FP8 blocks, and what balancing sets without a gradient
_NO_PARAMETERS = (SCALE, ".e_score_correction_bias")


@strict
@dataclass
class ParameterCounts:
    """Parameters of a checkpoint, from the shapes of its tensors.

    Attributes:
        main: of the model without its MTP layers, embedding and output head included.
        active: those of `main` that one token passes through: of the routed experts, the chosen ones.
        mtp: of the MTP layers, without the copies of embedding and head that each of them has in the files.
    """

    main: int
    active: int
    mtp: int


@strict
@dataclass
class _Tokenizer:
    class_name: str = field(metadata={"name": "class"})
    entries: int
    chat_template: bool


@strict
@dataclass
class _Base:
    name: str
    config: dict
    parameters: ParameterCounts | None


@strict
@dataclass
class CheckpointRecord:
    """See the top of this file, which lists the fields as they stand in JSON."""

    checkpoint: CheckpointIdentity
    files: int
    bytes: int
    stored_as: dict[str, int]
    parameters: ParameterCounts | None
    tokenizer: dict[str, Any] | None = field(metadata={"schema": _Tokenizer | None})
    base: dict[str, Any] | None = field(metadata={"schema": _Base | None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without folders of this machine."""
        return plain(shareable({"record": RECORD, "version": VERSION, **asdict(self)}))


def describe_checkpoint(folder: str | Path | CheckpointFolder) -> CheckpointRecord:
    """The record of a folder's checkpoint or adapter. Reads every weight, for the digest.

    Raises:
        CheckpointError: it is none, or a file is broken.
    """
    if not isinstance(folder, CheckpointFolder):
        folder = CheckpointFolder(folder)
    config = None if folder.is_adapter else folder.model_config()
    stored_as = Counter[str]()
    for tensor in folder.tensors.values():
        stored_as[tensor.dtype_name] += math.prod(tensor.shape)
    paths = {tensor.path for tensor in folder.tensors.values()}
    return CheckpointRecord(
        checkpoint=checkpoint_identity(folder),
        files=len(paths),
        bytes=sum(Path(path).stat().st_size for path in paths),
        stored_as=dict(sorted(stored_as.items())),
        parameters=None if config is None else parameter_counts(folder.tensors, config),
        tokenizer=_tokenizer(folder.path),
        base=_base(folder) if folder.is_adapter else None,
    )


def parameter_counts(tensors: Mapping[str, StoredTensor], config: DeepseekV3Config) -> ParameterCounts | None:
    """Count the parameters of an official checkpoint; None where its files hold something else than the values."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not _field(quantization, "weight_block_size"):
        return None
    main = mtp = routed = 0
    for name, tensor in tensors.items():
        if name.endswith(_NO_PARAMETERS):
            continue
        values = math.prod(tensor.shape)
        layer = _LAYER.search(name)
        if layer is not None and int(layer[1]) >= config.num_hidden_layers:
            mtp += 0 if name.endswith(COPIES) else values
            continue
        main += values
        routed += values if ".mlp.experts." in name else 0
    return ParameterCounts(main, main - routed + round(routed * config.active_expert_share), mtp)


def read_checkpoint_record(path: str | Path) -> CheckpointRecord:
    """A record as it was written.

    Raises:
        RecordError: naming the file and the first field that is missing or wrong.
    """
    source, values = str(path), read_values(path)
    check_kind(source, values, RECORD, VERSION, "a checkpoint")
    return read_fields(CheckpointRecord, values, source)


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """What the folder's own tokenizer is; None where it has none that can be loaded."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    return {
        "class": type(tokenizer).__name__,
        "entries": len(tokenizer),
        "chat_template": tokenizer.chat_template is not None,
    }


def _base(adapter: CheckpointFolder) -> dict[str, Any] | None:
    """Configuration and size of an adapter's model where that is a folder here, else None."""
    named = adapter.fields.get("base_model_name_or_path")
    path = Path(named or "").expanduser()
    if not named or not (path / CONFIG).is_file():
        return None
    try:
        base = CheckpointFolder(path)
        counts = parameter_counts(base.tensors, base.model_config())
    except ValueError:  # a broken one is its own card's business
        return None
    parameters = None if counts is None else asdict(counts)
    return {"name": path.resolve().name, "config": base.fields, "parameters": parameters}


def _field(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else getattr(values, name, None)
