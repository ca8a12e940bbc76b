"""Healing of a pruned model: next-token prediction, and distillation from the model that it was.

The loss is cross-entropy plus `weight` times the divergence KL(teacher || student) of the next token's distributions,
both at a temperature T and the divergence times T² (Hinton et al., arXiv 1503.02531), a mean over the predicted
tokens. Experts are balanced meanwhile, since what removed experts did falls to others, and MTP layers are trained by
their own objective. Without a teacher it is the control: the unpruned model trained as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..models.dsv3.mtp_dsv3 import shift_left
from ..option_error import OptionError
from .checkpoints import checkpoint_step, latest_checkpoint
from .load_balancing import LoadBalancingCallback, routers
from .metrics import require_base_model
from .mtp_objective import MtpObjectiveCallback


def summed_divergence(
    student_TV: torch.Tensor, teacher_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sum of KL(teacher || student) times the squared temperature over the tokens that have a target, fp32.

    Args:
        student_TV, teacher_TV: logits `(T, V)`.
        targets_T: `(T,)`, -100 where there is no target.
    """
    predicts = targets_T != -100
    student, teacher = ((x[predicts].float() / temperature).log_softmax(-1) for x in (student_TV, teacher_TV))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


class DistillationTrainer(Trainer):
    """`Trainer` that adds the divergence from a teacher to the model's own loss.

    The model computes its loss itself, so that multi-token prediction and balance ride in it as in any training.
    `distillation/loss` is logged beside it: the divergence, a mean over predicted tokens since the last log, without
    its weight. Evaluation measures the model's loss alone. Logits of one batch are held of both models.

    Args:
        teacher: a model with the same vocabulary, which is put in evaluation mode, and where the student is.
        weight: of the divergence. temperature: T, of both distributions.
        arguments, options: those of `Trainer`.

    Raises:
        ValueError: for another vocabulary, the student as its own teacher, or a weight or temperature that is none.
    """

    def __init__(
        self, *arguments: Any, teacher: PreTrainedModel, weight: float = 1.0, temperature: float = 1.0, **options: Any
    ):
        super().__init__(*arguments, **options)
        if not 0 < weight < float("inf") or not 0 < temperature < float("inf"):
            raise ValueError(f"`weight={weight}` and `temperature={temperature}` must be above 0.")
        if teacher is self.model:
            raise ValueError("`teacher` is the model that is trained: give a copy of it from before it was pruned.")
        if teacher.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"`teacher` has a vocabulary of {teacher.config.vocab_size}, the model one of "
                f"{self.model.config.vocab_size}."
            )
        self.teacher = teacher.eval().to(self.args.device)
        self.weight, self.temperature = weight, temperature
        self._divergence, self._tokens = 0.0, 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self._distillation(outputs.logits, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, logits_BSV: torch.Tensor, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        with torch.no_grad():
            teacher_BSV = self.teacher(**given, use_cache=False).logits
        targets_T = shift_left(inputs["labels"], 1, -100).flatten()
        total = summed_divergence(logits_BSV.flatten(0, 1), teacher_BSV.flatten(0, 1), targets_T, self.temperature)
        tokens = int(targets_T.ne(-100).sum())
        self._divergence += total.item()
        self._tokens += tokens
        if num_items is None:
            return self.weight * total / max(tokens, 1)
        # As `Trainer` does with the model's own loss, which is a sum over all ranks' tokens too
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.weight * total / num_items * ranks

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        if "loss" in logs and self._tokens:
            logs["distillation/loss"] = self._divergence / self._tokens
            self._divergence, self._tokens = 0.0, 0
        super().log(logs, *arguments, **options)


def healing_arguments(
    output_dir: str | Path, steps: int, learning_rate: float = 3e-4, **options: Any
) -> TrainingArguments:
    """Arguments of a run that heals, of a learning rate that rises over a tenth of it and falls to 0.

    Args:
        output_dir: of checkpoints, from the last of which a run that was stopped goes on.
        steps: optimizer steps.
        learning_rate: at its highest; 0.0003 suits some ten million parameters, billions need a tenth of it or less.
        options: other fields of `TrainingArguments`.

    Raises:
        OptionError: for fewer steps than one.
    """
    if steps < 1:
        raise OptionError("--heal", f"is a number of steps, 1 or more, not {steps}")
    defaults = {
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(steps // 10, 1),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(
        output_dir=str(output_dir), max_steps=steps, learning_rate=learning_rate, **{**defaults, **options}
    )


def heal(
    model: PreTrainedModel,
    train_dataset: Dataset,
    args: TrainingArguments,
    teacher: PreTrainedModel | None = None,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    balance_loss_weight: float = 0.1,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Trains a pruned model, in place, to predict as the unpruned one does; or that one as long, as a control.

    Args:
        model: of this package, in a dtype that trains.
        train_dataset: rows with `input_ids` and `labels`.
        args: such as `healing_arguments` gives. A run that left checkpoints in `output_dir` goes on from the last.
        teacher: the unpruned model. None trains by cross-entropy alone, which is the control.
        weight, temperature: of the divergence from it.
        balance_loss_weight: of the sequence-wise balance loss; 0.1 suits batches of a few thousand tokens.
        callbacks: others beside those for balance and MTP.

    Returns:
        The trainer, which has trained.

    Raises:
        ValueError: for a model of another package or that cannot be trained, and as `DistillationTrainer` does.
    """
    base = require_base_model(model, "heal")
    own: list[TrainerCallback] = []
    if routers(model):
        own.append(LoadBalancingCallback(seq_aux_loss_weight=balance_loss_weight))
    if base.mtp_layers:
        own.append(MtpObjectiveCallback())
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": train_dataset,
        "callbacks": [*own, *callbacks],
    }
    if teacher is None:
        trainer = Trainer(**options)
    else:
        trainer = DistillationTrainer(**options, teacher=teacher, weight=weight, temperature=temperature)
    checkpoint = latest_checkpoint(Path(args.output_dir))
    if checkpoint is not None and checkpoint_step(checkpoint) >= args.max_steps > 0:
        # Every step is done, and `Trainer` would make one more
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.config.use_cache = True  # the trainer turns it off
    model.eval()
    return trainer
