"""One stage of a pipeline: some parts of the model, run on one microbatch at a time.

The modules are those of the model and keep its names. What all layers of a pass share (masks, rotary angles, targets)
is made anew on every stage from the batch, which every process has, so that only hidden states travel.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...models.dsv3.objectives_dsv3 import language_model_loss, make_training_pass
from ...models.dsv3.training_pass_dsv3 import CarriedLoss, TrainingPass, running
from .partition import Part, modules_of


@dataclass
class Microbatch:
    """Some rows of a batch, and what a process keeps of them from forward to backward.

    Attributes:
        inputs: `input_ids` `(B, S)`, and `attention_mask`, `position_ids`, `labels` or `shift_labels` where given.
        num_items: targets of the whole optimizer step, by which losses are divided.
        training_pass: what the stages of this process share in training, None in evaluation.
        loss: of next-token prediction, where the head is.
    """

    inputs: dict[str, torch.Tensor]
    num_items: torch.Tensor
    training_pass: TrainingPass | None = None
    loss: torch.Tensor | None = None

    @property
    def targets(self) -> torch.Tensor:
        """`(B, S)`, the token that each position predicts, -100 where there is none."""
        shifted = self.inputs.get("shift_labels")
        return F.pad(self.inputs["labels"][:, 1:], (0, 1), value=-100) if shifted is None else shifted


def split_batch(model: Any, inputs: dict[str, torch.Tensor], rows: int, num_items: torch.Tensor) -> list[Microbatch]:
    """A batch in microbatches of `rows` rows, the last of which may have fewer."""
    total = inputs["input_ids"].shape[0]

    def part(tensor: torch.Tensor, start: int) -> torch.Tensor:
        # One row of positions is for all rows
        return tensor if tensor.shape[0] != total else tensor[start : start + rows]

    microbatches = []
    for start in range(0, total, rows):
        batch = Microbatch({name: part(tensor, start) for name, tensor in inputs.items()}, num_items)
        if model.training:
            batch.training_pass = make_training_pass(model, None, batch.targets) or TrainingPass()
            batch.training_pass.loss_is_known = True
            # The gradient of a token's loss is known before any backward pass, on stages without the loss too
            batch.training_pass.token_weight = torch.ones_like(num_items, dtype=torch.float32) / num_items.clamp(min=1)
        microbatches.append(batch)
    return microbatches


class StageModule(nn.Module):
    """The parts of one stage.

    Args:
        model: the whole `DeepseekV3ForCausalLM`; of modules elsewhere nothing is asked but their names.
        parts: which of it are run here.
        microbatches: those of the step under way, by their number. One list, whose content is replaced.
        autocast: dtype of matrix products, None for that of the weights.
    """

    def __init__(self, model: Any, parts: list[Part], microbatches: list[Microbatch], autocast: torch.dtype | None):
        super().__init__()
        self.needed = nn.ModuleList([module for part in parts for module in modules_of(part, model)])
        object.__setattr__(self, "model", model)  # not a part of the stage
        self.layers = [part for part in parts if part.kind in ("attention", "network")]
        self.kinds = {part.kind for part in parts}
        self.microbatches = microbatches
        self.autocast = autocast

    def forward(self, carried: torch.Tensor, microbatch: torch.Tensor) -> torch.Tensor:
        """
        Args:
            carried: `(B, S, D)` of the stage before; the first stage reads nothing of it.
            microbatch: `(1,)`, its number, on the CPU.

        Returns:
            `(B, S, D)`, or of the last stage the loss, a fp32 scalar.
        """
        device = next(self.parameters()).device
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            return self._run(carried, self.microbatches[int(microbatch)])

    def _run(self, carried: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        decoder = self.model.get_decoder()
        is_first = "embedding" in self.kinds
        beginning = decoder.begin(
            input_ids=batch.inputs["input_ids"] if is_first else None,
            attention_mask=batch.inputs.get("attention_mask"),
            position_ids=batch.inputs.get("position_ids"),
            inputs_embeds=None if is_first else carried,
            use_cache=False,
            training_pass=batch.training_pass,
        )
        hidden_states = beginning.inputs_embeds
        with running(beginning.router_pass) if beginning.router_pass else nullcontext():
            hidden_states = self._run_layers(hidden_states, beginning.layer_inputs)
        if "head" in self.kinds:
            hidden_states = decoder.norm(hidden_states)
        elif "mtp" not in self.kinds:
            return hidden_states

        training_pass = batch.training_pass
        if "mtp" in self.kinds and training_pass is not None and training_pass.mtp_loss_weight:
            embeds = decoder.embed_tokens(batch.inputs["input_ids"])
            hidden_states = decoder.finish(hidden_states, beginning._replace(inputs_embeds=embeds))
        if "head" not in self.kinds:
            return self._mtp_loss(hidden_states, batch)
        targets = batch.targets
        loss, _ = language_model_loss(
            self.model,
            hidden_states,
            batch.inputs.get("labels"),
            targets,
            # A later stage has the MTP layers
            training_pass if training_pass is not None and training_pass.targets is not None else None,
            self.model.lm_head.out_features,
            True,
            {"num_items_in_batch": batch.num_items, "shift_labels": targets},
        )
        batch.loss = loss.detach()
        if "mtp" in self.kinds or not decoder.mtp_layers:
            return loss
        unit = TrainingPass()
        unit.token_weight = torch.ones_like(loss)
        return CarriedLoss.apply(hidden_states, loss, unit, 1.0)

    def _run_layers(self, hidden_states: torch.Tensor, layer_inputs: dict[str, Any]) -> torch.Tensor:
        layers = self.model.get_decoder().layers
        index = 0
        while index < len(self.layers):
            part = self.layers[index]
            layer = layers[part.layer]
            if part.kind == "attention" and index + 1 < len(self.layers):
                hidden_states = layer(hidden_states, **layer_inputs)
                index += 2
                continue
            if part.kind == "attention":
                half = functools.partial(layer.attend, **layer_inputs)
            else:
                half = functools.partial(layer.feed_forward, position_ids=layer_inputs["position_ids"])
            if layer.gradient_checkpointing and layer.training:
                hidden_states = layer._gradient_checkpointing_func(half, hidden_states)
            else:
                hidden_states = half(hidden_states)
            index += 1
        return hidden_states

    def _mtp_loss(self, hidden_states: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """The MTP layers' share of the loss, where the head is on the stage before."""
        training_pass = batch.training_pass
        if training_pass is None or training_pass.mtp_sum is None:
            return (hidden_states * 0).sum().float()
        mtp_sum, training_pass.mtp_sum = training_pass.mtp_sum, None
        return training_pass.mtp_loss_weight * mtp_sum / batch.num_items
