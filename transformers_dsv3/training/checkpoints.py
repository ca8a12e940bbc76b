"""Resuming what was killed: which checkpoint is whole, and what is left to tidy up.

`Trainer` writes a checkpoint in place, under its final name, and Transformers' `get_last_checkpoint` goes by names
alone. Nothing but the standard library is imported at the top: the quickstart refuses before it imports more.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(folder: Path, remove_others: bool = True) -> Path | None:
    """The newest `checkpoint-N` of the folder that was written to its end.

    The trainer writes `trainer_state.json` after everything else, so a checkpoint where it reads is whole.

    Args:
        remove_others: remove the half-written ones; the trainer that writes them must have ended.
    """
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
            continue  # somebody's own
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if state["global_step"] != checkpoint_step(checkpoint):
                raise ValueError
            whole.append(checkpoint)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            if remove_others:
                shutil.rmtree(checkpoint, ignore_errors=True)
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_to_resume(folder: Path, save_total_limit: int | None) -> Path | None:
    """[`latest_checkpoint`], after finishing what a killed trainer had begun to remove.

    The trainer removes old checkpoints when the new one is whole, the oldest first; one that was half removed may
    still have its `trainer_state.json`.
    """
    from transformers.trainer_utils import rotate_checkpoints

    latest = latest_checkpoint(folder)
    if latest is not None:
        state = json.loads((latest / "trainer_state.json").read_text(encoding="utf-8"))
        rotate_checkpoints(str(folder), save_total_limit, best_model_checkpoint=state.get("best_model_checkpoint"))
    return latest


def move_in(partial: Path, folder: Path) -> None:
    """Move the files of a checkpoint that was written aside into its folder, config.json last.

    Until then nothing loads the folder.
    """
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        path.replace(folder / path.name)
    partial.rmdir()
