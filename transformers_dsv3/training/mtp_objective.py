"""The weight of the multi-token prediction objective over a training run (arXiv 2412.19437, sections 2.2 and 4.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from .metrics import MetricsCallback, base_model_of


class MtpObjectiveCallback(MetricsCallback):
    """Trains the MTP layers beside next-token prediction, with a weight λ that falls towards the end of the run.

    ```python
    Trainer(model=model, args=args, train_dataset=data, callbacks=[MtpObjectiveCallback()])
    ```

    The layers share embedding and output head with the model. λ is put into `config.mtp_loss_weight` at each step, and
    what stood there comes back when the training ends. Logged with every training loss, which is that of next-token
    prediction alone: `mtp/loss` (mean over targets and layers, without λ), `mtp/acceptance` (share of second tokens,
    of 16 positions a micro-batch, at which greedy decoding would accept the first layer's draft), `mtp/loss_weight`.

    Args:
        weight: λ, 0.3 as DeepSeek-V3's.
        final_weight: λ of the end of the run, 0.1 as DeepSeek-V3's.
        final_ratio: share of the run, at its end, with the final weight; DeepSeek-V3's last 4.8 of 14.8 T tokens.

    Raises:
        ValueError: for arguments out of range; when training begins, for a model without MTP layers, one whose layers
            are frozen (adapters), and in the hands of preference trainers (`DPOTrainer`).
    """

    def __init__(self, weight: float = 0.3, final_weight: float = 0.1, final_ratio: float = 0.32):
        for name, value, most in (
            ("weight", weight, float("inf")),
            ("final_weight", final_weight, float("inf")),
            ("final_ratio", final_ratio, 1.0),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"`{name}={value!r}` must lie between 0 and {most}.")
        if not max(weight, final_weight):
            raise ValueError("`weight` and `final_weight` are both 0: leave the callback out.")
        self.weight = weight
        self.final_weight = final_weight
        self.final_ratio = final_ratio
        self.weight_before = 0.0

    def weight_at(self, step: int, max_steps: int) -> float:
        """λ of optimizer step `step`, counted from 0, of a run of `max_steps`."""
        return self.final_weight if step >= max_steps * (1 - self.final_ratio) else self.weight

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        base = base_model_of(model)
        if base is None or not base.mtp_layers:
            raise ValueError(
                "MtpObjectiveCallback is for DeepSeek-V3 models of transformers_dsv3 with MTP layers "
                "(`num_nextn_predict_layers` above 0)."
            )
        if hasattr(model, "peft_config"):
            raise ValueError(
                "MtpObjectiveCallback trains whole MTP layers, which are frozen under an adapter: leave it out."
            )
        # Before the optimizer is made, which takes the parameters that are trainable by then
        self.weight_before = base.config.mtp_loss_weight
        base.config.mtp_loss_weight = max(self.weight, self.final_weight)
        model.train(model.training)
        if not any(layer.eh_proj.weight.requires_grad for layer in base.mtp_layers):
            raise ValueError("The MTP layers are frozen: make them trainable, or leave MtpObjectiveCallback out.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        if not getattr(model, "trains_next_token_prediction", True):
            raise ValueError("MTP is an objective of language modelling: leave MtpObjectiveCallback out here.")
        base = base_model_of(model)
        assert base is not None
        base.mtp_totals = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.mtp_loss_weight = self.weight_at(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.mtp_loss_weight = self.weight_before

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        base = base_model_of(model)
        assert base is not None
        figures = {"mtp/loss_weight": self.weight_at(max(state.global_step - 1, 0), state.max_steps)}
        totals = base.mtp_totals
        base.mtp_totals = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            totals = torch.zeros(4, device=base.norm.weight.device) if totals is None else totals
            dist.all_reduce(totals)
        if totals is not None:
            loss, targets, compared, accepted = totals.tolist()
            if targets:
                figures["mtp/loss"] = loss / targets
            if compared:
                figures["mtp/acceptance"] = accepted / compared
        return figures
