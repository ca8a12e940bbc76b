"""A folder that one training run owns: it remembers what it was started with and is resumed by the same command.

FOLDER/                 the official checkpoint and its tokenizer, once the run has ended, training_record.json and
                        eval_results.json
FOLDER/run.json         what the run was started with
FOLDER/tokenizer/       its tokenizer, from the start
FOLDER/before_results.json  what was measured before it trained, where that is asked for
FOLDER/checkpoint-N/    the trainer's resumable checkpoints
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..files import partial_path, write_json
from .checkpoints import checkpoint_step, checkpoint_to_resume, latest_checkpoint, move_in


class RunFolderError(ValueError):
    """The folder cannot take this run; the message names the folder and says why."""


class RunFolder:
    """See the top of this file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the run's own tokenizer, None where no run has kept one."""
        kept = self.path / "tokenizer"
        return kept if kept.is_dir() and self.record_path.exists() else None

    @property
    def finished_step(self) -> int | None:
        """Step that the official checkpoint in the folder is of, None where no run has ended there."""
        try:
            # The last file of a run; longer runs in the same folder write it again
            results = json.loads((self.path / "eval_results.json").read_text(encoding="utf-8"))
            return int(results["step"]) if (self.path / "config.json").exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_finished(self, args: TrainingArguments) -> bool:
        """Whether a run has ended at the very step that is asked for, so that nothing is left to do."""
        return self.record_path.exists() and self.finished_step == args.max_steps

    @contextmanager
    def explaining_interruption(self, args: TrainingArguments) -> Iterator[None]:
        """Where Ctrl-C stops what is done within, say how to go on in place of a traceback, and exit."""
        try:
            yield
        except KeyboardInterrupt:
            if args.process_index == 0:
                checkpoint = latest_checkpoint(self.path, remove_others=False) if self.record_path.exists() else None
                if checkpoint is None:
                    message = "Stopped before the first checkpoint: the same command starts again."
                else:
                    message = f"Stopped. The same command goes on from the last checkpoint, {checkpoint}."
                print(f"\n{message}", file=sys.stderr)  # below the progress bar
            sys.exit(130)  # what shells expect of a program that Ctrl-C has ended

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse a folder that holds something else than a run with these settings. Writes nothing.

        Args:
            settings: what has to stay the same for the run to go on, by the names of the options, as JSON keeps it.

        Raises:
            RunFolderError: naming the first setting that differs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a folder")
        if not self.record_path.exists():
            # Killed while it wrote its record, a run leaves the record's first part and nothing else.
            partial = partial_path(self.record_path).name
            others = sorted(path.name for path in self.path.glob("*") if path.name != partial)
            if others:
                raise RunFolderError(
                    f"{self.path} holds something else ({', '.join(others[:3])}): choose a new folder"
                )
            return
        try:
            recorded = dict(json.loads(self.record_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{self.record_path} is damaged ({error}): choose a new folder") from None
        asked = json.loads(json.dumps(settings))
        for name in {**recorded, **asked}:
            before, now = recorded.get(name), asked.get(name)
            if before != now:
                raise RunFolderError(
                    f"{self.path} was started with other settings ({name} was {before!r} and is {now!r} now): repeat "
                    "the first command to go on, or choose a new folder"
                )

    def record(self, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Tie the folder to these settings and keep the tokenizer, where that was not done before."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.record_path.exists():
            write_json(self.record_path, settings)
        if self.tokenizer is None:
            partial = self.path / "tokenizer.partial"
            shutil.rmtree(partial, ignore_errors=True)
            tokenizer.save_pretrained(partial)
            partial.replace(self.path / "tokenizer")

    def checkpoint_to_resume(self, args: TrainingArguments) -> Path | None:
        """The newest whole checkpoint; broken ones are removed, see `checkpoints.py`.

        Raises:
            RunFolderError: it is past the end of the run, or the run has no length in steps.
        """
        if args.max_steps < 1:
            raise RunFolderError("--max_steps: give the length of the run in steps")
        checkpoint = checkpoint_to_resume(self.path, args.save_total_limit)
        done = max(0 if checkpoint is None else checkpoint_step(checkpoint), self.finished_step or 0)
        if done > args.max_steps:
            raise RunFolderError(f"{self.path} is trained up to step {done:,}, past --max_steps {args.max_steps:,}")
        return checkpoint

    def measured_before(
        self, measure: Callable[[], dict[str, float]], name: str = "before_results.json"
    ) -> dict[str, float]:
        """What `measure` gives before the run trains. Kept in the folder: a run that is resumed has it from there."""
        path = self.path / name
        if not path.exists():
            write_json(path, measure())
        return json.loads(path.read_text(encoding="utf-8"))

    def train_evaluate_save(
        self, trainer: Trainer, checkpoint: Path | None, record: Callable[[dict[str, float]], None] | None = None
    ) -> dict[str, float]:
        """Train from the checkpoint to the end, evaluate, and save the official checkpoint into the folder.

        Args:
            record: called in one process with the evaluation's metrics, once the checkpoint is in the folder and
                before the run counts as finished.

        Returns:
            The evaluation's metrics.
        """
        train_from(trainer, checkpoint)
        metrics = {**trainer.evaluate(), "step": trainer.args.max_steps}
        trainer.log_metrics("eval", metrics)
        save_whole(trainer, self.path)
        if record is not None and trainer.args.should_save:
            record(metrics)
        trainer.save_metrics("eval", metrics, combined=False)  # see `finished_step`
        return metrics


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end: from the checkpoint, or without one from the start.

    A run that was killed after its last step has nothing left to train: its model, or the adapter on it, takes the
    weights of the checkpoint.
    """
    if checkpoint is None or checkpoint_step(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PreTrainedModel):
        trained = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())
    else:
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save model and tokenizer into a folder that holds a run, whole. To be called by all processes.

    The model's config gets back its `use_cache`, which the trainer turns off.

    The README.md that PEFT and TRL fill in from their templates is left out: it knows neither text nor results.
    `transformers-dsv3 card` makes one from the run's record.
    """
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True
    partial = folder / "saving.partial"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        for readme in (partial / "README.md", folder / "README.md"):
            if readme.exists() and is_template(readme.read_text(encoding="utf-8")):
                readme.unlink()
        move_in(partial, folder)
    trainer.accelerator.wait_for_everyone()


def is_template(readme: str) -> bool:
    """Whether a README.md is what TRL or PEFT fills in by itself, with nothing written into it."""
    return readme.count("[More Information Needed]") > 10 or (
        "It has been trained using [TRL]" in readme and "If you had a time machine" in readme
    )
