"""Checkpoints without some of their routed experts, written shard by shard, in the official layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import write_json, write_refusal
from ..models.dsv3.checkpoint_checks_dsv3 import mtp_layers_present
from ..models.dsv3.checkpoint_files_dsv3 import (
    CheckpointError,
    CheckpointFiles,
    StoredTensor,
    listing,
    read_checkpoint,
    resolve_checkpoint,
)
from ..models.dsv3.checkpoint_saving_dsv3 import publish, staging
from ..option_error import OptionError
from .expert_choice import ExpertImportance, choose_experts
from .expert_pruning import recentred
from .plan import model_config


# What a checkpoint's folder holds beside its weights that is true of the pruned one too. Records and cards are not.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
_EXPERT = re.compile(r"^(.*\blayers\.(\d+)\.mlp\.experts\.)(\d+)\.(.+)$")
# Stacks of experts, which `save_original_format=False` writes
_STACK = re.compile(r"^.*\blayers\.(\d+)\.mlp\.experts\.[^.\d]+$")
_ROUTER = re.compile(r"^.*\blayers\.(\d+)\.mlp\.gate\.(weight|e_score_correction_bias)$")
# Names of the number of experts in configurations
_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")


def prune_checkpoint(
    folder: str | Path,
    output: str | Path,
    share: float,
    importance: ExpertImportance | None = None,
    by: str = "reap",
    seed: int = 0,
    progress: bool = False,
) -> dict[int, tuple[int, ...]]:
    """Writes a checkpoint with a share of its routed experts removed, shard by shard, and no more than one in memory.

    Weights stay in the dtypes they are in, quantised ones too. The tokenizer and the generation config are copied.

    Args:
        folder: of an official checkpoint.
        output: folder to write, made if needed. The files are put in place when all are there.
        share, importance, by, seed: as `prune_experts` takes them.
        progress: whether to show a progress bar.

    Returns:
        From a layer's number to the experts that are left of it.

    Raises:
        OptionError: for a share that cannot be removed, another criterion, a folder that is no checkpoint, or an
            output that cannot be written.
        CheckpointError: for a damaged checkpoint, or one that lacks experts. Nothing is written then.
    """
    folder, output = Path(folder), Path(output)
    config = model_config(folder)
    files = resolve_checkpoint(str(folder))
    if files is None:
        raise OptionError("CHECKPOINT", f"{folder} holds no safetensors weights")
    stored = read_checkpoint(files.files, files.index)
    config.num_nextn_predict_layers = mtp_layers_present(
        list(stored), config.num_hidden_layers, config.num_nextn_predict_layers or 0
    )
    kept = choose_experts(config, share, importance, by, seed)
    _check_experts(stored, kept, config.n_routed_experts)
    fields = _pruned_fields(folder / "config.json", config.n_routed_experts, len(next(iter(kept.values()))))
    if output.resolve() == folder.resolve():
        raise OptionError("--output", f"{output} is the checkpoint that is read: choose another folder")
    if output.is_file():
        raise OptionError("--output", f"{output} is a file, not a folder")
    output.mkdir(parents=True, exist_ok=True)
    if (refusal := write_refusal(output)) is not None:
        raise OptionError("--output", refusal)
    with staging(str(output)) as place:
        _write_shards(Path(place), files, stored, kept, progress)
        copy_companions(folder, Path(place))
        write_json(Path(place) / "config.json", fields)
        publish(place, str(output), None)
    return kept


def copy_companions(folder: Path, target: Path) -> None:
    """Copies the tokenizer, the generation config and code of a checkpoint."""
    for pattern in _COPIED:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _check_experts(stored: dict[str, StoredTensor], kept: dict[int, tuple[int, ...]], total: int) -> None:
    """Refuses a checkpoint in which an expert or a router is missing, or of which a layer was not chosen from."""
    found: dict[int, set[int]] = {}
    routers: dict[int, set[str]] = {}
    for name in stored:
        if match := _EXPERT.match(name):
            found.setdefault(int(match[2]), set()).add(int(match[3]))
        elif match := _STACK.match(name):
            found.setdefault(int(match[1]), set()).update(range(stored[name].shape[0]))
        elif match := _ROUTER.match(name):
            routers.setdefault(int(match[1]), set()).add(match[2])
    wrong = [
        f"layer {layer}"
        for layer in sorted(found.keys() | kept.keys())
        if layer not in kept or found.get(layer) != set(range(total)) or len(routers.get(layer, ())) != 2
    ]
    if wrong:
        raise CheckpointError(
            f"The files do not hold {total} routed experts with a router's weight and bias, as the config says, in "
            f"{listing(wrong)}"
        )


def _pruned_fields(path: Path, total: int, left: int) -> dict[str, Any]:
    """The configuration's own fields, with the new number of experts."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if re.search(r"experts\\*\.\d", json.dumps(fields.get("quantization_config", {}))):
        raise OptionError(
            "CHECKPOINT", f"{path}: its quantization_config names single experts, whose numbers would change"
        )
    counts = {name: left for name in _COUNTS if fields.get(name) == total}
    return {**fields, "n_routed_experts": left, **counts}


def _write_shards(
    place: Path,
    files: CheckpointFiles,
    stored: dict[str, StoredTensor],
    kept: dict[int, tuple[int, ...]],
    progress: bool,
) -> None:
    numbers = {layer: {expert: i for i, expert in enumerate(experts)} for layer, experts in kept.items()}
    weight_map: dict[str, str] = {}
    size = 0
    total = sum(tensor.nbytes for tensor in stored.values())
    with tqdm(total=total, desc="pruning", unit="B", unit_scale=True, disable=not progress) as bar:
        for path in files.files:
            tensors = {}
            for name, tensor in stored.items():
                if tensor.path == path:
                    if (new_name := _new_name(name, numbers)) is not None:
                        tensors[new_name] = _pruned(name, tensor, kept)
                    bar.update(tensor.nbytes)
            if tensors:
                save_file(tensors, place / Path(path).name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, Path(path).name)
            size += sum(tensor.nbytes for tensor in tensors.values())
    if files.index is not None:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(place / Path(files.index).name, index)


def _new_name(name: str, numbers: dict[int, dict[int, int]]) -> str | None:
    """A tensor's name in the pruned checkpoint; None where it is of an expert that is removed."""
    match = _EXPERT.match(name)
    if match is None:
        return name
    number = numbers[int(match[2])].get(int(match[3]))
    return None if number is None else f"{match[1]}{number}.{match[4]}"


def _pruned(name: str, stored: StoredTensor, kept: dict[int, tuple[int, ...]]) -> torch.Tensor:
    tensor = stored.read()
    match = _ROUTER.match(name) or _STACK.match(name)
    if match is None:
        return tensor
    left = torch.tensor(kept[int(match[1])])
    if name.endswith("e_score_correction_bias"):
        return recentred(tensor, left)
    return tensor.index_select(0, left)
