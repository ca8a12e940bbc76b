"""What a training run leaves beside its checkpoint for those who want to know or repeat it: `training_record.json`.

    {
      "record": "transformers-dsv3 training", "version": 1,
      "method": "DPO",
      "checkpoint": {"name", "sha256", "config_sha256", "revision", "base"},   as in evaluation records
      "base": null, or {"name", "sha256"}: the checkpoint that the run started from
      "commands": ["transformers-dsv3 quickstart", …],        from the first, as far as they are known
      "data": {"source", "split", "sha256" or "fingerprint", …},
      "steps", "tokens", "seconds", "processes",              seconds are of the last command
      "parameters": null, or {"trained", "total"},
      "arguments": {…},                                       of `TrainingArguments`
      "settings": {…},                                        of the method
      "results": [{"metric", "data", "before", "after", "beside"}],
      "history": {"loss": {"steps": […], "values": […]}, …},
      "date", "commit", "versions", "hardware"                as in evaluation records
    }

Numbers are finite or null. There is no path of the machine and no secret in it: it is published with the model.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import TrainerState, TrainingArguments

from ..files import write_json
from ..training.checkpoints import latest_checkpoint
from ..training.held_out_metrics import losses_of_parts
from .checkpoint_identity import CheckpointIdentity, checkpoint_digest, checkpoint_identity
from .machine import circumstances
from .record_fields import RecordError, check_kind, plain, read_fields, read_values
from .shareable import shareable, shareable_command


TRAINING_RECORD = "training_record.json"
RECORD, VERSION = "transformers-dsv3 training", 1
# Of `TrainingArguments`, what decides which steps are taken
ARGUMENTS = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "full_determinism",
    "seed",
    "data_seed",
)
# Of the logs, what is kept for curves, beside every name that ends in "loss"
LOGGED = ("router/utilisation", "mtp/acceptance", "rewards/accuracies", "rewards/margins", "mean_token_accuracy")
# A curve of more points is thinned out
MOST_POINTS = 250


@strict
@dataclass
class _Origin:
    name: str


@strict
@dataclass
class _Parameters:
    trained: int
    total: int


@strict
@dataclass
class _Result:
    metric: str
    data: str
    before: int | float | None
    after: int | float | None
    beside: dict


@strict
@dataclass
class _Curve:
    steps: list
    values: list


@strict
@dataclass
class _TrainingRecord:
    """What every record has; see the top of this file."""

    method: str
    checkpoint: CheckpointIdentity
    base: _Origin | None
    commands: list[str]
    date: str
    data: dict
    steps: int
    tokens: int | None
    parameters: _Parameters | None
    processes: int
    seconds: int | float | None
    arguments: dict
    settings: dict
    results: list[_Result]
    history: dict[str, _Curve]
    commit: str | None
    versions: dict
    hardware: dict


def save_training_record(
    folder: str | Path,
    *,
    method: str,
    arguments: TrainingArguments,
    state: TrainerState,
    data: dict[str, Any],
    results: Sequence[dict[str, Any]] = (),
    settings: dict[str, Any] | None = None,
    base: str | Path | None = None,
    block_size: int | None = None,
    parameters: dict[str, int] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of the run that has just saved its checkpoint into `folder`, and return it.

    Args:
        folder: a checkpoint or a PEFT adapter.
        method: of training, in a word or two: `pre-training`, `DPO`, `LoRA`, …
        state: the trainer's, whose log becomes the curves. Where a run was killed after its training and before its
            end, the log is that of its last checkpoint in `arguments.output_dir`.
        data: `source` and `split` in words, `sha256` or `fingerprint`, and counts of documents, pairs or bytes.
        results: what the run itself measured, see [`result`].
        settings: of the method.
        base: the checkpoint that the run started from, a folder or a name on the Hub.
        block_size: tokens of every example. Without it, tokens are those that TRL has counted.
        parameters: `trained` and `total`, for a run that trains a part of them.
        extra: more entries of the record, such as `completions`.
    """
    folder = Path(folder)
    log = list(state.log_history)
    if not any("loss" in entry for entry in log):
        checkpoint = latest_checkpoint(Path(arguments.output_dir), remove_others=False)
        if checkpoint is not None:
            trained = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            # The trainer itself has taken no step, and says so of its evaluation
            log = trained.log_history + [{**entry, "step": trained.global_step} for entry in log]
    steps = arguments.max_steps if arguments.max_steps > 0 else state.global_step
    if block_size is None:
        tokens = next((int(entry["num_tokens"]) for entry in reversed(log) if "num_tokens" in entry), None)
    else:
        rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        tokens = steps * rows * block_size
    origin, earlier = (None, []) if base is None else _base(base)
    previous = _record_or_none(folder / TRAINING_RECORD)
    if previous is not None and previous["steps"] < steps:
        earlier = previous["commands"]  # trained further
    given = arguments.to_dict()  # Transformers masks tokens in it
    record = {
        "record": RECORD,
        "version": VERSION,
        "method": method,
        "checkpoint": asdict(checkpoint_identity(folder)),
        "base": origin,
        "commands": [*earlier, shareable_command(sys.argv)],
        "data": data,
        "steps": steps,
        "tokens": tokens,
        "seconds": next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None),
        "processes": arguments.world_size,
        "parameters": parameters,
        "arguments": {name: given[name] for name in ARGUMENTS if name in given},
        "settings": settings or {},
        "results": list(results),
        "history": history(log),
        **(extra or {}),
        **circumstances(str(arguments.device)),
    }
    record = plain(shareable(record))
    write_json(folder / TRAINING_RECORD, record, indent=1, rows=True)
    return record


def result(
    metric: str, data: str, after: float, before: float | None = None, beside: dict[str, float] | None = None
) -> dict[str, Any]:
    """One thing that a run measured on what it did not train on.

    Args:
        metric: `loss` (nats a token), `bits_per_byte`, `accuracy` (a share) or another name.
        data: on what, in words.
        after, before: the run; None where it was not measured.
        beside: what others reach on the same data, by their names.
    """
    return {"metric": metric, "data": data, "before": before, "after": after, "beside": beside or {}}


def loss_results(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """The results of a run that evaluates several held-out texts by name, from the trainer's metrics."""
    parts = losses_of_parts(before, after)
    return [result("loss", f"held-out {name} text", new, old) for name, (old, new) in parts.items()]


def held_out_results(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """The results of pre-training: bits a byte and loss of the held-out text, and of each of its groups by name."""
    names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
    return [
        result(metric, f"held-out {f'{group} ' if group else ''}text", metrics[f"eval_{name}"])
        for metric in ("bits_per_byte", "loss")
        for name in names
        if name.endswith(metric)
        for group in [name.removesuffix(metric).rstrip("_").replace("_", ", ")]
    ]


def history(log: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """A trainer's log as curves: by name, `steps` and `values`, thinned out evenly with the last point kept."""
    curves: dict[str, dict[int, float]] = {}
    for entry in log:
        for name, value in entry.items():
            if (name.endswith("loss") or name in LOGGED) and name != "train_loss" and isinstance(value, (int, float)):
                curves.setdefault(name, {})[int(entry["step"])] = float(value)
    thinned: dict[str, dict[str, list[float]]] = {}
    for name, curve in curves.items():
        points = sorted(curve.items())
        every = -(-len(points) // MOST_POINTS)
        points = points[(len(points) - 1) % every :: every]
        # Five digits are more than can be seen
        values = [float(f"{value:.5g}") for _, value in points]
        thinned[name] = {"steps": [step for step, _ in points], "values": values}
    return thinned


def digest_of_rows(rows: Iterable[dict[str, Any]]) -> str:
    """sha256 of rows of plain values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()


def read_training_record(path: str | Path) -> dict[str, Any]:
    """A record as `save_training_record` wrote it.

    Raises:
        RecordError: naming the file and the first field that is missing or wrong.
    """
    source, values = str(path), read_values(path)
    check_kind(source, values, RECORD, VERSION, "a training run")
    read_fields(_TrainingRecord, values, source)
    return values


def _base(base: str | Path) -> tuple[dict[str, Any], list[str]]:
    """What is told of the checkpoint that a run started from, and the commands that made it."""
    folder = Path(base)
    if not folder.is_dir():
        return {"name": str(base), "sha256": None}, []
    origin = {"name": folder.resolve().name, "sha256": checkpoint_digest(folder)}
    record = _record_or_none(folder / TRAINING_RECORD)
    if record is None or record["checkpoint"]["sha256"] != origin["sha256"]:
        return origin, []  # a record that other weights have left behind tells nothing of these
    return origin, record["commands"]


def _record_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_training_record(path)
    except RecordError:
        return None
