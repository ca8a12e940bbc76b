"""Checkpoints of a pipeline: the model's official one, and the optimizer's state, which any other cut can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from .pipeline import Pipeline


OPTIMIZER_FOLDER = "pipeline_optimizer"


def whole_state_dict(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """All weights on the pipeline's first process, in its host's memory; an empty dictionary on the others."""
    first = dist.get_global_rank(pipeline.group, 0)
    whole: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    parameters = dict(pipeline.model.named_parameters(remove_duplicate=False))
    for name, tensor in pipeline.model.state_dict().items():
        holders = pipeline.holders.get(name)
        if holders is None or 0 in holders:  # a buffer, which is everywhere
            if pipeline.rank == 0:
                same = seen.setdefault(id(parameters.get(name, tensor)), name)
                whole[name] = whole[same] if same in whole else tensor.cpu()
        elif pipeline.owns(name):
            dist.send(tensor.contiguous(), first, group=pipeline.group)
        elif pipeline.rank == 0:
            received = torch.empty(tensor.shape, dtype=tensor.dtype, device=pipeline.device)
            dist.recv(received, dist.get_global_rank(pipeline.group, holders[0]), group=pipeline.group)
            whole[name] = received.cpu()
    return whole


def _names(pipeline: Pipeline) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in pipeline.model.named_parameters()}


def save_optimizer(pipeline: Pipeline, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes the state of each parameter once, under its name. Called by all processes."""
    names = _names(pipeline)
    state = {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        if pipeline.owns(names[parameter])
        for key, value in values.items()
    }
    dcp.save(state, checkpoint_id=folder / OPTIMIZER_FOLDER, process_group=pipeline.group)


def load_optimizer(pipeline: Pipeline, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads the state of this process's parameters, by whatever pipeline it was written. Called by all processes.

    Raises:
        ValueError: where the folder has no such state, or none of a parameter that is trained here.
    """
    path = folder / OPTIMIZER_FOLDER
    if not path.is_dir():
        raise ValueError(
            f"{folder} has no optimizer state of a pipeline ({OPTIMIZER_FOLDER}): it was saved by another trainer, or "
            "with `save_only_model=True`."
        )
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    names = _names(pipeline)
    keys: dict[str, list[str]] = {}
    for entry in stored:
        name, _, key = entry.rpartition("/")
        keys.setdefault(name, []).append(key)
    wanted: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        name = names[parameter]
        for key in keys.get(name, ()):
            entry = stored[f"{name}/{key}"]
            if hasattr(entry, "size"):
                # Counts of steps stay on the CPU, as optimizers make them
                device = parameter.device if entry.size == parameter.shape else torch.device("cpu")
                wanted[f"{name}/{key}"] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
            else:
                wanted[f"{name}/{key}"] = None
    missing = [names[parameter] for parameter in parameters if names[parameter] not in keys]
    if missing and keys:
        raise ValueError(f"The optimizer state in {path} has nothing of {missing[0]}: it is of another model.")
    dcp.load(wanted, checkpoint_id=path, process_group=pipeline.group)
    for parameter in parameters:
        name = names[parameter]
        optimizer.state[parameter] = {key: wanted[f"{name}/{key}"] for key in keys.get(name, ())}
