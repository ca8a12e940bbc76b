"""What a compression is to do, and everything of it that may be refused, found out before any work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation.checkpoint_folder import CheckpointFolder
from ..evaluation.checkpoint_identity import config_digest
from ..files import write_refusal
from ..memory import total_memory
from ..models.dsv3.checkpoint_checks_dsv3 import mtp_layers_present
from ..models.dsv3.checkpoint_conversion_dsv3 import official_name
from ..models.dsv3.checkpoint_dsv3 import fit_problems
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError, listing
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from ..models.dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from ..option_error import OptionError
from .calibration_text import CalibrationText, calibration_text
from .checkpoint_weights import CheckpointWeights
from .compressed_layout import Layout, kind_of, layout
from .expert_choice import kept_experts
from .layer_compression import tokens_at_once
from .memory_need import memory_needed, pruning_memory, weights_left
from .plan import quantized_refusal
from .settings import WHOLE, CompressionSettings


MODEL_TYPES = ("deepseek_v3", "kimi_k2")


@dataclass
class CompressionJob:
    """All that was found out before the work."""

    folder: CheckpointFolder
    config: DeepseekV3Config
    source: CheckpointWeights
    layout: Layout
    settings: CompressionSettings
    text: CalibrationText | None
    output: Path

    def description(self) -> dict[str, Any]:
        """What decides the result; compared when a command goes on."""
        found = [(path, os.stat(path)) for path in self.source.files]
        stats = [(Path(path).name, stat.st_size, stat.st_mtime_ns) for path, stat in found]
        return {
            "settings": asdict(self.settings),
            "checkpoint": hashlib.sha256(json.dumps([config_digest(self.folder), stats]).encode()).hexdigest(),
            "text": None if self.text is None else self.text.sha256,
        }


def work_folder(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.compressing"


def prepare(
    checkpoint: Path,
    output: Path,
    settings: CompressionSettings,
    text: Sequence[str | Path] | None,
    memory: int | None,
) -> CompressionJob:
    """Looks at everything that may be refused."""
    if settings.heal and not settings.prune:
        raise OptionError("--heal", "trains what --prune leaves of the experts: give that too")
    _check_output(output)
    try:
        folder = CheckpointFolder(checkpoint)
        config, source = _read(folder)
        _check_tensors(checkpoint, config, source)
    except CheckpointError as error:
        raise OptionError("CHECKPOINT", str(error)) from error
    planned = layout(source.tensors, config.num_hidden_layers, settings, config.tie_word_embeddings)
    if planned.bits and settings.of("experts") == WHOLE:
        raise OptionError(
            "--experts-bits", "16 beside fewer bits elsewhere: native Transformers opens no such checkpoint"
        )
    if not planned.bits:
        raise OptionError("--bits", "16 leaves weights as they are, and here it would leave all of them")
    if settings.prune:
        if not any(kind_of(name) == "experts" for name in source.tensors):
            raise OptionError("--prune", f"{checkpoint} has no routed experts")
        kept_experts(config, settings.prune)
    needs_text = settings.method == "gptq" or bool(settings.prune)
    if text and not needs_text:
        raise OptionError("--text", "is read by --method gptq and by --prune; --method nearest alone needs none")
    if needs_text and settings.window > config.max_position_embeddings:
        raise OptionError(
            "--window", f"{settings.window} is more than the {config.max_position_embeddings} tokens of the model"
        )
    at_once = tokens_at_once(config.hidden_size, settings.window) if settings.method == "gptq" else None
    needs = {"the widest matrices of this checkpoint take": memory_needed(config, source.tensors, planned, at_once)}
    if settings.prune:
        needs["removing experts, which has the model in memory, takes"] = pruning_memory(
            config, source.tensors, settings
        )
    allowed = total_memory() // 2 if memory is None else memory
    for what, needed in needs.items():
        if needed > allowed:
            raise OptionError("--memory", f"{_gib(allowed)} are too few: {what} {_gib(needed)}")
    taken = None
    if needs_text:
        paths = None if text is None else [Path(path) for path in text]
        taken = calibration_text(checkpoint, paths, settings, config.num_nextn_predict_layers, config.vocab_size)
    job = CompressionJob(folder, config, source, planned, settings, taken, output)
    _check_disk(job)
    return job


def pruned_job(job: CompressionJob, folder: Path) -> CompressionJob:
    """What is left to do when experts are removed: `folder` holds the checkpoint without them."""
    read = CheckpointFolder(folder)
    config, source = _read(read)
    planned = layout(source.tensors, config.num_hidden_layers, job.settings, config.tie_word_embeddings)
    return replace(job, folder=read, config=config, source=source, layout=planned)


def _read(folder: CheckpointFolder) -> tuple[DeepseekV3Config, CheckpointWeights]:
    """The configuration with the MTP layers that are there, and the weights."""
    config = _config(folder)
    if (refusal := quantized_refusal(folder.fields)) is not None:
        raise CheckpointError(f"{folder.config_path}: {refusal}")
    source = CheckpointWeights(folder.tensors, folder.fields.get("quantization_config"))
    config.num_nextn_predict_layers = mtp_layers_present(
        list(source.tensors), config.num_hidden_layers, config.num_nextn_predict_layers or 0
    )
    return config, source


def _check_tensors(checkpoint: Path, config: DeepseekV3Config, source: CheckpointWeights) -> None:
    tensors = source.tensors
    with torch.device("meta"):
        whole = DeepseekV3ForCausalLM._from_config(config)
    if problems := fit_problems(whole, tensors, block_size=source.block_size):
        raise CheckpointError(f"{checkpoint} does not fit its config:\n  " + "\n  ".join(problems[:20]))
    tied = getattr(whole, "all_tied_weights_keys", None) or {}
    names = [official_name(name, config) for name, value in whole.state_dict().items() if value.numel()]
    # Of stacked experts each was looked for before
    missing = [name for name in names if name not in tensors and ".experts." not in name and name not in tied]
    if missing:
        raise CheckpointError(f"{checkpoint} lacks tensors of an official checkpoint: {listing(missing)}")


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OptionError("--output", f"{output} is there already: choose a new folder")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise OptionError("--output", f"there is no folder {parent}")
    if (refusal := write_refusal(parent)) is not None:
        raise OptionError("--output", refusal)


def _check_disk(job: CompressionJob) -> None:
    output, settings = job.output, job.settings
    needed = job.layout.n_bytes
    if job.text is not None and settings.method == "gptq":
        needed += 4 * job.text.windows.numel() * job.config.hidden_size * 4
    if settings.prune:
        left = weights_left(job.source.tensors, settings.prune)
        stored = max(tensor.dtype.itemsize for tensor in job.source.tensors.values())
        # Beside it, healed, and two checkpoints of the training with its optimizer's state
        needed += left * (2 * stored + 2 * 12 if settings.heal else stored)
    work = work_folder(output)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0
    free = shutil.disk_usage(output.absolute().parent).free
    if needed - there > free:
        raise OptionError(
            "--output", f"{_gib(needed - there)} are needed in {output.absolute().parent}, where {_gib(free)} are free"
        )


def _config(folder: CheckpointFolder) -> DeepseekV3Config:
    model_type = folder.fields.get("model_type")
    if folder.is_adapter or model_type not in MODEL_TYPES:
        what = "an adapter" if folder.is_adapter else f"a checkpoint of type {model_type!r}"
        raise CheckpointError(f"{folder.path} is {what}; compressed are {' and '.join(MODEL_TYPES)}")
    return folder.model_config()


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
