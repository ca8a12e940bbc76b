"""What processes of a pipeline are refused, each for itself or all together where they do not have the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from ...models.dsv3.inputs_dsv3 import check_inputs, check_labels
from ...models.dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from ...option_error import OptionError
from .arguments import PipelineArguments


_INPUTS = {"input_ids", "labels", "shift_labels", "attention_mask", "position_ids"}


def check_model(model: Any) -> None:
    if not isinstance(model, DeepseekV3ForCausalLM):
        kind = type(model).__name__
        raise OptionError("model", f"PipelineTrainer cuts a DeepseekV3ForCausalLM of transformers_dsv3, not a {kind}.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise OptionError("model", "The model was cut before, or is on the meta device: load it anew.")
    if getattr(model, "_tp_size", None) or getattr(model.config, "distributed_config", None) is not None:
        raise OptionError(
            "model", "The model was sharded when it was loaded (`distributed_config`): load it whole for a pipeline."
        )
    if getattr(model, "hf_device_map", None) or getattr(model, "quantization_method", None):
        raise OptionError("model", "The model is quantised or on several devices: load it plain for a pipeline.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError("model", "Adapters are not trained in a pipeline.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if "model.embed_tokens.weight" not in trained:
        raise OptionError(
            "model", "The embedding is frozen: gradients would end on a stage before. Make it trainable."
        )


def check_agreement(
    arguments: PipelineArguments, args: TrainingArguments, model: Any, group: dist.ProcessGroup
) -> None:
    """Refuses, on every process, settings or models that differ between them.

    Raises:
        ValueError: naming the rank and the field.
    """
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "bf16",
        "seed",
    )
    described = {
        "PipelineArguments": asdict(arguments),
        "TrainingArguments": {name: getattr(args, name) for name in names},
        "the model's config": json.loads(json.dumps(model.config.to_dict(), default=str, sort_keys=True)),
        "the parameters that are trained": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }
    seen: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(seen, described, group=group)
    for rank, theirs in enumerate(seen):
        for name, value in theirs.items():
            if value != seen[0][name]:
                raise ValueError(f"Rank {rank} and rank 0 differ in {name}: {_difference(value, seen[0][name])}")


def _difference(mine: Any, other: Any) -> str:
    if isinstance(mine, dict):
        name = next(name for name in mine if mine[name] != other.get(name))
        return f"{name} is {mine[name]} and {other.get(name)}"
    return f"{len(mine)} and {len(other)} of them" if len(mine) != len(other) else f"{mine} and {other}"


def check_batches(
    model: Any, batches: list[Any], divisor: int, group: dist.ProcessGroup, failure: Exception | None = None
) -> None:
    """Refuses, on every process, batches that cannot be run or are not the same on all of them.

    Args:
        divisor: what the number of rows must be a multiple of.
        failure: of reading them on this process.

    Raises:
        ValueError: naming the rank and what is wrong.
    """
    refusal = None if failure is None else f"reading the data failed: {failure!r}"
    for batch in batches:
        refusal = refusal or _batch_refusal(model, batch, divisor)
    shapes = None if refusal else [tuple(batch["input_ids"].shape) for batch in batches]
    mine = {"refusal": refusal, "shapes": shapes, "content": None if refusal else _fingerprint(batches)}
    seen: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(seen, mine, group=group)
    for rank, theirs in enumerate(seen):
        if theirs["refusal"]:
            raise ValueError(f"Rank {rank} cannot run a batch: {theirs['refusal']}") from failure
    for rank, theirs in enumerate(seen):
        if theirs["shapes"] != seen[0]["shapes"]:
            raise ValueError(
                f"Rank {rank} has batches of shapes {theirs['shapes']}, rank 0 of {seen[0]['shapes']}: every process "
                "must read the same rows, in the same order, to the same end."
            )
        if theirs["content"] != seen[0]["content"]:
            raise ValueError(
                f"Rank {rank} and rank 0 have different rows: every process must read the same ones, in the same "
                "order. Does the dataset depend on the rank, or on a seed that differs?"
            )


def _batch_refusal(model: Any, batch: Any, divisor: int) -> str | None:
    """Why a batch cannot be run, None where it can."""
    unknown = sorted(set(batch) - _INPUTS)
    if unknown:
        return f"`{unknown[0]}` is not taken by a pipeline, only {', '.join(sorted(_INPUTS))}"
    if "input_ids" not in batch or not {"labels", "shift_labels"} & set(batch):
        return f"`input_ids` and `labels` are needed, there are {', '.join(sorted(batch)) or 'none'}"
    rows = batch["input_ids"].shape[0]
    if rows % divisor:
        return (
            f"it has {rows} rows, which `microbatches={divisor}` does not divide: a stream must end with a whole "
            "batch, or set `dataloader_drop_last=True`"
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "`attention_mask` must be 2D, 0 for padding"
    try:
        embedding = model.get_decoder().embed_tokens
        check_inputs(model.config, embedding, batch["input_ids"], None, mask, batch.get("position_ids"))
        check_labels(model.config.vocab_size, batch.get("labels"), batch["input_ids"])
    except ValueError as error:
        return str(error)
    return None


def _fingerprint(batches: list[Any]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
