"""The weight of the multi-token prediction objective over a training run (arXiv 2412.19437, sections 2.2 and 4.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .metrics import MetricsCallback, base_model_of, require_base_model


logger = logging.get_logger(__name__)


class MtpObjectiveCallback(MetricsCallback):
    """Trains the MTP layers beside next-token prediction, with a weight λ that falls towards the end of the run.

    ```python
    Trainer(model=model, args=args, train_dataset=data, callbacks=[MtpObjectiveCallback()])
    ```

    The layers share embedding and output head with the model. λ is put into `config.mtp_loss_weight` at each step, and
    what stood there comes back when the training ends. Logged with every training loss, which is that of next-token
    prediction alone: `mtp/loss` (mean over targets and layers, without λ), `mtp/acceptance` (share of second tokens
    at which greedy decoding would accept the first layer's draft, of 16 positions a micro-batch, or one a row),
    `mtp/loss_weight`.

    Args:
        weight: λ, 0.3 as DeepSeek-V3's.
        final_weight: λ of the end of the run, 0.1 as DeepSeek-V3's.
        final_ratio: share of the run, at its end, with the final weight; DeepSeek-V3's last 4.8 of 14.8 T tokens.

    Raises:
        ValueError: for arguments out of range; when the trainer is made or training begins, for a model without MTP
            layers, one whose layers are frozen (adapters) or not in the optimizer, with label smoothing, and in the
            hands of preference trainers (`DPOTrainer`).
    """

    def __init__(self, weight: float = 0.3, final_weight: float = 0.1, final_ratio: float = 0.32):
        for name, value in (("weight", weight), ("final_weight", final_weight)):
            # At 0 the layers would come to rest within the run, and DistributedDataParallel wait for their gradients
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"`{name}={value!r}` must be above 0; without an MTP objective leave the callback out."
                )
        if not 0 <= final_ratio <= 1:
            raise ValueError(f"`final_ratio={final_ratio!r}` must lie between 0 and 1.")
        self.weight = weight
        self.final_weight = final_weight
        self.final_ratio = final_ratio

    def weight_at(self, step: int, max_steps: int) -> float:
        """λ of optimizer step `step`, counted from 0, of a run of `max_steps`."""
        return self.final_weight if step >= max_steps * (1 - self.final_ratio) else self.weight

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        base = require_base_model(model, type(self).__name__)
        if not base.mtp_layers:
            raise ValueError(
                "MtpObjectiveCallback trains MTP layers, and this model has none (`num_nextn_predict_layers=0`): "
                "leave it out."
            )
        if hasattr(model, "peft_config"):
            raise ValueError(
                "MtpObjectiveCallback trains whole MTP layers, which are frozen under an adapter: leave it out."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                "With `label_smoothing_factor` the trainer keeps the labels to itself, and MTP cannot be trained: set "
                "it to 0, or leave MtpObjectiveCallback out."
            )
        self.set_for_training(model, "mtp_loss_weight", self.weight)
        model.train(model.training)  # thaws the layers
        if not any(layer.is_trained for layer in base.mtp_layers):
            raise ValueError("The MTP layers are frozen: make them trainable, or leave MtpObjectiveCallback out.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        base = base_model_of(model)
        if base is not None and not base.training_state.trains_next_token_prediction:
            raise ValueError("MTP is an objective of language modelling: leave MtpObjectiveCallback out here.")
        super().on_train_begin(args, state, control, **kwargs)
        assert base is not None  # others were refused
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            parameters = [parameter for layer in base.mtp_layers for parameter in layer.parameters()]
            is_elsewhere = all(parameter.is_meta for parameter in parameters)  # another stage of a pipeline has them
            if not is_elsewhere and not any(id(parameter) in trained for parameter in parameters):
                raise ValueError(
                    "The optimizer was made without the MTP layers, which were frozen then. Give MtpObjectiveCallback "
                    "to the trainer when it is made, in `callbacks`; with `model_init`, let it make models with "
                    "`mtp_loss_weight` set."
                )
        base.training_state.mtp_totals = base.training_state.losses_left_out = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.mtp_loss_weight = self.weight_at(state.global_step, state.max_steps)

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        base = base_model_of(model)
        assert base is not None
        training_state = base.training_state
        if training_state.losses_left_out is not None and int(training_state.losses_left_out):
            training_state.losses_left_out = None
            logger.warning_once(
                "The trainer's loss is not next-token prediction with equal weights: MTP is not trained. Leave "
                "MtpObjectiveCallback out."
            )
            return {"mtp/loss_weight": 0.0}
        figures = {"mtp/loss_weight": self.weight_at(max(state.global_step - 1, 0), state.max_steps)}
        totals, training_state.mtp_totals = training_state.mtp_totals, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            totals = torch.zeros(4, device=base.rotary_emb.inv_freq.device) if totals is None else totals
            dist.all_reduce(totals)
        if totals is not None:
            loss, targets, compared, accepted = totals.tolist()
            if targets:
                figures["mtp/loss"] = loss / targets
            if compared:
                figures["mtp/acceptance"] = accepted / compared
        return figures
