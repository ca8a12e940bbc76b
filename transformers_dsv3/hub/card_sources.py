"""What a model card is made from: a checkpoint, or its records alone, and the records of its training and evaluations.

Everything that is read here was looked at for folders of a machine and access tokens when it was written; it is once
more, since files can be changed in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.checkpoint_folder import CheckpointFolder, model_config
from ..evaluation.checkpoint_identity import config_digest
from ..evaluation.checkpoint_record import (
    CHECKPOINT_RECORD,
    CheckpointRecord,
    ParameterCounts,
    describe_checkpoint,
    read_checkpoint_record,
)
from ..evaluation.evaluation_record import RECORD as EVALUATION
from ..evaluation.evaluation_record import EvaluationRecord, read_record
from ..evaluation.record_fields import RecordError
from ..evaluation.shareable import shareable
from ..evaluation.training_record import TRAINING_RECORD, read_training_record
from ..files import json_bytes
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config


@dataclass(frozen=True)
class CardSources:
    """All that is known of a model.

    Attributes:
        checkpoint: name, digest, sizes, parameters.
        config: of the model, of an adapter that of its base model; None where that is not at hand.
        architecture: the official name of the model's class, as in its config.json.
        adapter: `adapter_config.json`; None for a model.
        training: `training_record.json`; None where there is none.
        evaluations: by file name, in the order of their dates.
        records: contents of the files that the card can be made from again without the weights, by name.
    """

    checkpoint: CheckpointRecord
    config: DeepseekV3Config | None
    architecture: str
    adapter: dict[str, Any] | None
    training: dict[str, Any] | None
    evaluations: dict[str, EvaluationRecord]
    records: dict[str, bytes]

    @property
    def parameters(self) -> ParameterCounts | None:
        """Of the model; of an adapter those of its base model."""
        if self.adapter is None:
            return self.checkpoint.parameters
        counts = None if self.checkpoint.base is None else self.checkpoint.base["parameters"]
        return None if counts is None else ParameterCounts(**counts)

    @property
    def base_name(self) -> str | None:
        """What the model was trained from, by the records; None for one that was trained from scratch, or unknown."""
        if self.training is not None and self.training["base"] is not None:
            return str(self.training["base"]["name"])
        if self.adapter is None:
            return None
        if self.checkpoint.base is not None:
            return str(self.checkpoint.base["name"])
        named = self.adapter.get("base_model_name_or_path")
        return str(named) if named else None


def read_sources(folder: str | Path, results: str | Path | Iterable[str | Path] = ()) -> CardSources:
    """Read a checkpoint or an adapter with its records, and check that all of them are of the same weights.

    Small files come first: whatever is wrong with one of them shows before the weights are read for their digest.

    Args:
        folder: a checkpoint or an adapter; or a folder with `checkpoint_record.json` in place of the weights.
            Records of evaluations in it are taken too.
        results: a record of an evaluation or a folder that holds some, or several of these.

    Raises:
        CheckpointError: the folder is none of these, or a file of it is broken.
        RecordError: naming the file, for what is no record, is not complete, or is of another model.
    """
    described = CheckpointFolder(Path(folder).expanduser())
    folder, adapter = described.path, described.fields if described.is_adapter else None
    config_sha256 = config_digest(described)
    if adapter is None:
        _check_model_type(str(described.config_path), described.fields)
    weights = described.weights is not None
    if not weights and not (folder / CHECKPOINT_RECORD).is_file():
        raise CheckpointError(
            f"{folder} has neither safetensors weights nor {CHECKPOINT_RECORD}, which stands for them in the folder "
            "of a card"
        )
    named = [results] if isinstance(results, (str, Path)) else list(results)
    evaluations = _latest(_read_results(folder, named))
    training = read_training_record(folder / TRAINING_RECORD) if (folder / TRAINING_RECORD).is_file() else None
    records = {str(folder / TRAINING_RECORD): training["checkpoint"]} if training is not None else {}
    records |= {str(path): vars(record.checkpoint) for path, record in evaluations}
    for path, identity in records.items():
        if identity["config_sha256"] != config_sha256:
            raise RecordError(_of_another(path, identity, "config_sha256", folder, config_sha256))
    if adapter is not None:
        _check_bases(folder, training, evaluations)

    checkpoint = describe_checkpoint(described) if weights else read_checkpoint_record(folder / CHECKPOINT_RECORD)
    if checkpoint.checkpoint.config_sha256 != config_sha256:
        raise RecordError(
            _of_another(
                str(folder / CHECKPOINT_RECORD), vars(checkpoint.checkpoint), "config_sha256", folder, config_sha256
            )
        )
    for path, identity in records.items():
        if identity["sha256"] != checkpoint.checkpoint.sha256:
            raise RecordError(_of_another(path, identity, "sha256", folder, checkpoint.checkpoint.sha256))
    checkpoint = CheckpointRecord(**{**vars(checkpoint), **_shareable_parts(checkpoint)})
    names = _file_names([path for path, _ in evaluations])
    fields = (checkpoint.base or {"config": {}})["config"] if adapter is not None else described.fields
    return CardSources(
        checkpoint=checkpoint,
        config=_model_config(str(folder), fields),
        architecture=str((fields.get("architectures") or ["DeepseekV3ForCausalLM"])[0]),
        adapter=shareable(adapter),
        training=shareable(training),
        evaluations={
            name: EvaluationRecord.from_dict(record.to_dict(), name) for name, (_, record) in zip(names, evaluations)
        },
        records=_record_files(described, checkpoint, dict(zip(names, (path for path, _ in evaluations)))),
    )


def _check_model_type(path: str, config: dict[str, Any]) -> None:
    if config.get("model_type") != "deepseek_v3":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, and cards are of 'deepseek_v3'")


def _model_config(source: str, fields: dict[str, Any]) -> DeepseekV3Config | None:
    """None where nothing is known of an adapter's base model."""
    if not fields:
        return None
    _check_model_type(source, fields)
    return model_config(source, fields)


def _read_results(folder: Path, results: list[str | Path]) -> list[tuple[Path, EvaluationRecord]]:
    """Records by their files: of the folder itself, then those that were named."""
    paths = list(_evaluations_in(folder))
    for result in results:
        path = Path(result).expanduser()
        if not path.exists():
            raise RecordError(f"{result}: no such file or folder")
        found = list(_evaluations_in(path)) if path.is_dir() else [path]
        if not found:
            raise RecordError(f"{result} holds no record of `transformers-dsv3 evaluate`")
        paths += found
    records = []
    for path in {path.resolve(): path for path in paths}.values():
        record = read_record(path)
        if not record.complete:
            raise RecordError(f"{path} is not complete: run the same command again, {record.command}")
        records.append((path, record))
    return records


def _evaluations_in(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not one of them
        if isinstance(values, dict) and values.get("record") == EVALUATION:
            yield path


def _latest(records: list[tuple[Path, EvaluationRecord]]) -> list[tuple[Path, EvaluationRecord]]:
    """Of one evaluation that was made again, the last."""
    latest: dict[str, tuple[Path, EvaluationRecord]] = {}
    for path, record in sorted(records, key=lambda entry: entry[1].date):
        latest[json.dumps([record.checkpoint.sha256, record.settings, record.seed], sort_keys=True)] = path, record
    return sorted(latest.values(), key=lambda entry: (entry[1].date, entry[0].name))


def _check_bases(
    folder: Path, training: dict[str, Any] | None, evaluations: list[tuple[Path, EvaluationRecord]]
) -> None:
    """An adapter's figures are of the model that it was put on."""
    trained_on = None if training is None else (training["base"] or {}).get("sha256")
    for path, record in evaluations:
        base = record.checkpoint.base
        if trained_on is not None and base is not None and base.sha256 != trained_on:
            raise RecordError(
                f"{path} is of {record.checkpoint.name} on {base.name} (sha256 {base.sha256}), and the adapter was "
                f"trained on another base model (sha256 {trained_on}, {folder / TRAINING_RECORD})"
            )


def _of_another(path: str, identity: dict[str, Any], field: str, folder: Path, here: str) -> str:
    what = "configuration has" if field == "config_sha256" else "weights have"
    return (
        f"{path} is of another model: of {identity['name']}, whose {what} the sha256 {identity[field]}, and of "
        f"{folder} it is {here}. Evaluate this model anew, or take the file away"
    )


def _shareable_parts(checkpoint: CheckpointRecord) -> dict[str, Any]:
    return {name: shareable(getattr(checkpoint, name)) for name in ("tokenizer", "base")}


def _file_names(paths: list[Path]) -> list[str]:
    """Their own names; of several that are called the same, the later ones with a number."""
    names: list[str] = []
    for path in paths:
        name, number = path.name, 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}.json"
        names.append(name)
    return names


def _record_files(
    folder: CheckpointFolder, checkpoint: CheckpointRecord, evaluations: dict[str, Path]
) -> dict[str, bytes]:
    own = [path for path in (folder.config_path, folder.path / TRAINING_RECORD) if path.is_file()]
    files = {path.name: path for path in own} | evaluations
    contents = {name: _shareable_bytes(path) for name, path in files.items()}
    return {**contents, CHECKPOINT_RECORD: json_bytes(checkpoint.to_dict(), indent=1)}


def _shareable_bytes(path: Path) -> bytes:
    """The file as it is, where nothing in it has to go."""
    data = path.read_bytes()
    values = json.loads(data)
    clean = shareable(values)
    return data if clean == values else json_bytes(clean)
