"""The record of one evaluation: what was measured, on which checkpoint, by what, where and when.

One JSON file. The parts that were not asked for are null:

    {
      "record": "transformers-dsv3 evaluation", "version": 1,
      "complete": true,                 false while parts are missing: the same command goes on
      "checkpoint": {"name", "sha256", "config_sha256", "revision", "base"},
                                        see `CheckpointIdentity`; "base" is null, or the same of an adapter's model
      "command": "transformers-dsv3 evaluate …",
      "settings": {…},                  every option that figures depend on, by its name
      "seed": 0, "date": "2026-01-31T12:00:00+00:00",
      "commit": "…",                    of this package's source; null where unknown, "-dirty" behind it where changed
      "versions": {"python", "torch", "transformers", …},
      "hardware": {"cpu", "cores", "memory_bytes", "device", …},
      "text": {"source", "sha256", "documents", "bytes", "tokens", "window", "stride", "bits_per_byte",
               "nats_per_token", "perplexity", "byte_perplexity", "zlib_bits_per_byte", "lzma_bits_per_byte"},
      "routing": {"source", "sha256", …}, the rest as `RoutingReport.to_dict`
      "speed": {"prompt_tokens", "new_tokens", "threads", "greedy_tokens_per_second", "prefill_tokens_per_second",
                "cache_bytes_per_token", "load_average", …},
      "tasks": {"TASK": {"metrics": {"acc,none": {"value", "stderr", "higher_is_better"}},
                         "n", "n_total", "num_fewshot", "version", "dataset", "samples_sha256", "subtasks",
                         "truncated"}},          true where prompts longer than the context lost their beginning
      "human_eval": {"problems", "samples", "temperature", "pass@k": {"1": {"value", "stderr"}}, "outcomes", …}
    }

Numbers are finite or null. Names and digests stand for files: no path of the machine is in it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from .checkpoint_identity import CheckpointIdentity
from .machine import circumstances
from .routing import RoutingReport
from .shareable import shareable


RECORD, VERSION = "transformers-dsv3 evaluation", 1
PARTS = ("text", "routing", "speed", "tasks", "human_eval")


class RecordError(ValueError):
    """A file is no record of an evaluation; the message names it, the field, and what is wrong."""


@dataclass
class EvaluationRecord:
    """See the top of this file, which lists the fields as they stand in JSON."""

    checkpoint: CheckpointIdentity
    command: str
    settings: dict[str, Any]
    seed: int
    commit: str | None
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    date: str
    complete: bool = False
    text: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    human_eval: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what is not finite becomes None, of absolute paths the last part stays."""
        return plain(shareable({"record": RECORD, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_dict(cls, values: Any, source: str = "the record") -> EvaluationRecord:
        """The record that `to_dict` was called on, from JSON too.

        Raises:
            RecordError: `source` and the first field that is missing or wrong.
        """
        check_kind(source, values, RECORD, VERSION, "`transformers-dsv3 evaluate`")
        check_fields(source, values, _FIELDS)
        fields = {name: values[name] for name in _FIELDS}
        fields["checkpoint"] = identity_from_dict(source, "checkpoint", values["checkpoint"])
        _check_parts(source, values)
        return cls(**fields)

    def write(self, path: Path) -> None:
        """Write the record so that a reader sees the old file or the new one, never half of it."""
        write_json(path, self.to_dict())


def new_record(
    checkpoint: CheckpointIdentity, *, command: str, settings: dict[str, Any], seed: int, device: str = "cpu"
) -> EvaluationRecord:
    """A record without figures, of this moment, machine and source."""
    return EvaluationRecord(
        checkpoint=checkpoint, command=command, settings=settings, seed=seed, **circumstances(device)
    )


def read_record(path: str | Path) -> EvaluationRecord:
    """Read and check a record.

    Raises:
        RecordError: naming the file and the first field that is missing or wrong.
    """
    return EvaluationRecord.from_dict(read_values(path), str(path))


def read_values(path: str | Path) -> Any:
    """What a JSON file holds. Raises `RecordError` where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error})") from error


def check_kind(source: str, values: Any, record: str, version: int, of: str) -> None:
    """Refuse what is no record of this kind and version. `of` says in words what it should be of."""
    if not isinstance(values, dict) or values.get("record") != record:
        raise RecordError(f"{source} is no record of {of}: it has no 'record': {record!r}")
    if values.get("version") != version:
        raise RecordError(
            f"{source}: version {values.get('version')!r} of the record; this package reads version {version}"
        )


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "checkpoint": (dict,),
    "command": (str,),
    "settings": (dict,),
    "seed": (int,),
    "commit": (str, _NONE),
    "versions": (dict,),
    "hardware": (dict,),
    "date": (str,),
    "complete": (bool,),
    **dict.fromkeys(PARTS, (dict, _NONE)),
}
_IDENTITY_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "sha256": (str,),
    "config_sha256": (str,),
    "revision": (str, _NONE),
    "base": (dict, _NONE),
}
_NUMBER: tuple[type, ...] = (int, float)
_TEXT_FIELDS: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "sha256": (str,),
    **dict.fromkeys(("documents", "tokens", "bytes", "window"), (int,)),
    **dict.fromkeys(("bits_per_byte", "nats_per_token", "zlib_bits_per_byte", "lzma_bits_per_byte"), _NUMBER),
    **dict.fromkeys(("perplexity", "byte_perplexity"), (*_NUMBER, _NONE)),  # null where too large for a number
}
_SPEED_FIELDS: dict[str, tuple[type, ...]] = {
    "threads": (int,),
    **dict.fromkeys(("prefill_tokens_per_second", "greedy_tokens_per_second", "cache_bytes_per_token"), _NUMBER),
}
_MTP_SPEED_FIELDS: dict[str, tuple[type, ...]] = {
    "greedy_mtp_tokens_per_second": _NUMBER,
    "mtp_acceptance_rate": _NUMBER,
}
_TASK_FIELDS: dict[str, tuple[type, ...]] = {
    "metrics": (dict,),
    "n": (int, _NONE),
    "num_fewshot": (int, _NONE),
    "dataset": (str, _NONE),
    "subtasks": (list,),
    "truncated": (bool,),
}
_HUMAN_EVAL_FIELDS: dict[str, tuple[type, ...]] = {"pass@k": (dict,), "problems": (int,), "outcomes": (dict,)}
_FIGURE: dict[str, tuple[type, ...]] = {"value": (int, float, _NONE), "stderr": (int, float, _NONE)}


def check_fields(source: str, values: dict[str, Any], fields: dict[str, tuple[type, ...]], within: str = "") -> None:
    for name, types in fields.items():
        if name not in values:
            raise RecordError(f"{source}: field '{within}{name}' is missing")
        if not isinstance(values[name], types) or (isinstance(values[name], bool) and bool not in types):
            wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in types)
            raise RecordError(f"{source}: field '{within}{name}' is {values[name]!r:.40}, not {wanted}")


def identity_from_dict(source: str, field: str, values: dict[str, Any]) -> CheckpointIdentity:
    """A checkpoint's identity from a record's `field`. Raises `RecordError`."""
    check_fields(source, values, _IDENTITY_FIELDS, f"{field}.")
    for name in ("sha256", "config_sha256"):
        if len(values[name]) != 64 or set(values[name]) - set("0123456789abcdef"):
            raise RecordError(f"{source}: field '{field}.{name}' is {values[name]!r:.40}, not 64 hexadecimal digits")
    base = None if values["base"] is None else identity_from_dict(source, f"{field}.base", values["base"])
    return CheckpointIdentity(**{**{name: values[name] for name in _IDENTITY_FIELDS}, "base": base})


def _check_parts(source: str, values: dict[str, Any]) -> None:
    if values["text"] is not None:
        check_fields(source, values["text"], _TEXT_FIELDS, "text.")
    if values["routing"] is not None:
        try:
            RoutingReport.from_dict(values["routing"]).statistics.mean()
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{source}: field 'routing' is no routing report ({error})") from error
    if values["speed"] is not None:
        has_mtp = "mtp_acceptance_rate" in values["speed"]
        check_fields(source, values["speed"], {**_SPEED_FIELDS, **(_MTP_SPEED_FIELDS if has_mtp else {})}, "speed.")
    tasks = values["tasks"] or {}
    check_fields(source, tasks, dict.fromkeys(tasks, (dict,)), "tasks.")
    for task, entry in tasks.items():
        check_fields(source, entry, _TASK_FIELDS, f"tasks.{task}.")
        metrics = entry["metrics"]
        check_fields(source, metrics, dict.fromkeys(metrics, (dict,)), f"tasks.{task}.metrics.")
        for metric, figure in metrics.items():
            check_fields(source, figure, _FIGURE, f"tasks.{task}.metrics.{metric}.")
    if values["human_eval"] is not None:
        check_fields(source, values["human_eval"], _HUMAN_EVAL_FIELDS, "human_eval.")
        solved = values["human_eval"]["pass@k"]
        check_fields(source, solved, dict.fromkeys(solved, (dict,)), "human_eval.pass@k.")
        for k, figure in solved.items():
            check_fields(source, figure, {**_FIGURE, "value": _NUMBER}, f"human_eval.pass@k.{k}.")
