"""A checkpoint pruned by a text and healed on it, resumable: what `compress` does before it rounds."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..data.byte_bpe import TokenBlocks
from ..files import write_json
from ..models.dsv3.checkpoint_files_dsv3 import read_checkpoint, resolve_checkpoint
from ..option_error import OptionError
from ..training.healing import heal, healing_arguments
from .expert_choice import check_criterion, kept_experts
from .expert_pruning import expert_importance
from .plan import model_config
from .pruned_checkpoint import copy_companions, prune_checkpoint


# In the folder that is made: pairs of a layer's number and the experts that are left, by the numbers that they had
KEPT_EXPERTS = "pruning_record.json"


def prune_and_heal(
    checkpoint: str | Path,
    output: str | Path,
    share: float,
    windows: torch.Tensor,
    *,
    by: str = "reap",
    seed: int = 0,
    heal_steps: int = 0,
    learning_rate: float = 3e-4,
    progress: bool = False,
    **training: Any,
) -> dict[int, tuple[int, ...]]:
    """Removes a share of a checkpoint's routed experts, by what they do to a text, and trains what is left on it.

    The model is in memory, and twice in fp32 while it is healed. Until the result is whole, a hidden folder beside
    `output` has what is finished; called again after it was stopped, the same call goes on from there.

    Args:
        checkpoint: folder of an official checkpoint.
        output: folder to make; pruning_record.json there has what is returned.
        share, by, seed: as `prune_experts` takes them.
        windows: token ids of the text, int64 `(n, S)`; S tokens are a window, and an example.
        heal_steps: optimizer steps of healing; 0 leaves it out.
        learning_rate, training: as `healing_arguments` takes them.
        progress: whether to show progress bars.

    Returns:
        From a layer's number to the experts that are left of it.

    Raises:
        OptionError: before any work, for a share, a criterion or an output that cannot be.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config = model_config(checkpoint)
    kept_experts(config, share)
    check_criterion(by)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OptionError("--output", f"{output} is there already: choose a new folder")
    if heal_steps < 0:
        raise OptionError("--heal", f"is a number of steps, 0 or more, not {heal_steps}")
    work = output.absolute().parent / f".{output.name}.pruning"
    work.mkdir(parents=True, exist_ok=True)
    _check_work(
        work / "run.json",
        {
            "checkpoint": str(checkpoint.resolve()),
            "text": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
            **{"share": share, "by": by, "seed": seed, "heal_steps": heal_steps, "learning_rate": learning_rate},
            "training": {name: str(value) for name, value in training.items()},
        },
    )
    pruned, kept_file = work / "pruned", work / "kept.json"
    if not kept_file.is_file():
        importance = None
        if by != "random":
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
            importance = expert_importance(model, windows.flatten(), window=windows.shape[1], progress=progress)
            del model
        left = prune_checkpoint(checkpoint, pruned, share, importance, by, seed, progress)
        write_json(kept_file, list(left.items()), rows=True)
    if heal_steps:
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(it, dtype=torch.float32) for it in (pruned, checkpoint)
        )
        options = {"disable_tqdm": not progress, "seed": seed, **training}
        args = healing_arguments(work / "training", heal_steps, learning_rate, **options)
        heal(student, TokenBlocks(windows.flatten(), windows.shape[1]), args, teacher)
        finished = work / "healed"
        student.to(_dtype(checkpoint)).save_pretrained(finished)
        copy_companions(pruned, finished)
    else:
        finished = pruned
    shutil.copyfile(kept_file, finished / KEPT_EXPERTS)
    kept = {layer: tuple(experts) for layer, experts in json.loads(kept_file.read_text(encoding="utf-8"))}
    finished.replace(output)
    shutil.rmtree(work, ignore_errors=True)
    return kept


def _dtype(checkpoint: Path) -> torch.dtype:
    """Of the checkpoint's weights; bf16 where they are quantised."""
    files = resolve_checkpoint(str(checkpoint))
    assert files is not None  # it was read before
    stored = read_checkpoint(files.files, files.index)
    found = next(tensor.dtype for name, tensor in stored.items() if name.endswith("kv_a_proj_with_mqa.weight"))
    return found if found.itemsize > 1 else torch.bfloat16


def _check_work(path: Path, run: dict[str, Any]) -> None:
    """Refuses to go on with what other arguments have begun, and notes these."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := [name for name in run if before.get(name) != run[name]]:
            raise OptionError(
                "--output",
                f"{path.parent} is of a command that was stopped and had another {', another '.join(differing)}: give "
                "the same again, or remove that folder",
            )
    write_json(path, run)
