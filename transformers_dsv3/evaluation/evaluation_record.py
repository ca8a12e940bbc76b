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

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from ..files import write_json
from .checkpoint_identity import CheckpointIdentity
from .machine import circumstances
from .record_fields import RecordError, check_kind, plain, read_fields, read_values
from .routing import RoutingReport
from .shareable import shareable


RECORD, VERSION = "transformers-dsv3 evaluation", 1
PARTS = ("text", "routing", "speed", "tasks", "human_eval")


@strict
@dataclass
class _Text:
    source: str
    sha256: str
    documents: int
    tokens: int
    bytes: int
    window: int
    bits_per_byte: int | float
    nats_per_token: int | float
    zlib_bits_per_byte: int | float
    lzma_bits_per_byte: int | float
    perplexity: int | float | None  # null where too large for a number
    byte_perplexity: int | float | None


@strict
@dataclass
class _Speed:
    threads: int
    prefill_tokens_per_second: int | float
    greedy_tokens_per_second: int | float
    cache_bytes_per_token: int | float


@strict
@dataclass
class _MtpSpeed:
    """Beside `_Speed`, of a model with MTP layers."""

    greedy_mtp_tokens_per_second: int | float
    mtp_acceptance_rate: int | float


@strict
@dataclass
class _Figure:
    value: int | float | None
    stderr: int | float | None


@strict
@dataclass
class _Task:
    metrics: dict[str, _Figure]
    n: int | None
    num_fewshot: int | None
    dataset: str | None
    subtasks: list
    truncated: bool


@strict
@dataclass
class _Solved:
    value: int | float
    stderr: int | float | None


@strict
@dataclass
class _HumanEval:
    solved: dict[str, _Solved] = field(metadata={"name": "pass@k"})
    problems: int
    outcomes: dict


def _part(schema: Any) -> Any:
    """A part of a record: plain values, which are checked where a record is read."""
    return field(default=None, metadata={"schema": schema})


@strict
@dataclass
class EvaluationRecord:
    """See the top of this file, which lists the fields as they stand in JSON."""

    checkpoint: CheckpointIdentity
    command: str
    settings: dict[str, Any]
    seed: int
    commit: str | None
    versions: dict[str, Any]
    hardware: dict[str, Any]
    date: str
    complete: bool = False
    text: dict[str, Any] | None = _part(_Text | None)
    routing: dict[str, Any] | None = None  # a `RoutingReport`
    speed: dict[str, Any] | None = _part(_Speed | None)
    tasks: dict[str, Any] | None = _part(dict[str, _Task] | None)
    human_eval: dict[str, Any] | None = _part(_HumanEval | None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what is not finite becomes None, of absolute paths the last part stays."""
        return plain(shareable({"record": RECORD, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_dict(cls, values: Any, source: str = "the record") -> "EvaluationRecord":
        """The record that `to_dict` was called on, from JSON too.

        Raises:
            RecordError: `source` and the first field that is missing or wrong.
        """
        check_kind(source, values, RECORD, VERSION, "`transformers-dsv3 evaluate`")
        record = read_fields(cls, values, source)
        if record.speed is not None and "mtp_acceptance_rate" in record.speed:
            read_fields(_MtpSpeed, record.speed, source, "speed.")
        if record.routing is not None:
            try:
                RoutingReport.from_dict(record.routing).statistics.mean()
            except (KeyError, TypeError, AttributeError) as error:
                raise RecordError(f"{source}: field 'routing' is no routing report ({error})") from error
        return record

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
