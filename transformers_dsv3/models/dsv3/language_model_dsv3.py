"""What the language model does around its decoder, alone or with a vision tower: its pass, and what training asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.utils import logging

from ...kernels.selection import chosen
from .configuration_dsv3 import text_config
from .inputs_dsv3 import check_labels
from .linear_dsv3 import linear
from .objectives_dsv3 import freeze_idle_mtp_layers, language_model_loss, make_training_pass
from .outputs_dsv3 import Dsv3CausalLMOutputWithPast, Dsv3LazyCausalLMOutputWithPast, LazyLogits
from .training_pass_dsv3 import TrainingPass


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states `(B, S, D)` of which logits are asked for, as Transformers' own models take them.

    Args:
        logits_to_keep: so many last positions, 0 for all; a 1D tensor of positions or slots, the same in each row; 2D
            integers `(B, n)`, positions of each row; 2D booleans `(B, S)`, which gives `(number kept, D)`.
    """
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept, :]


class Dsv3TrainedMixin(_Base):
    """What trainers ask of a model that holds a `DeepseekV3Model`; goes in front of `PreTrainedModel`."""

    # Whether its loss is that of the next token, beside which the MTP layers train
    is_language_model = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self._freeze_idle_mtp_layers()
        return self

    def _freeze_idle_mtp_layers(self) -> None:
        if self.base_model is not self:  # the model around the decoder knows the loss
            freeze_idle_mtp_layers(self.get_decoder(), self.is_language_model)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Transformers' own; TRL's trainers say by it what they train the model for, each when it is made.

        Raises:
            ValueError: TRL would compute Mixtral's balance loss, over a softmax, from the logits of sigmoid routers.
        """
        super().add_model_tags(tags)
        names = [tags] if isinstance(tags, str) else tags
        if "trl" in names:
            if getattr(text_config(self.config), "output_router_logits", False):
                raise ValueError(
                    "`output_router_logits=True` in the model's config: TRL would compute Mixtral's softmax loss of "
                    "these logits, but DeepSeek-V3's routers are sigmoid. Set it to False; to balance the experts, "
                    "give SFTTrainer `callbacks=[transformers_dsv3.LoadBalancingCallback(seq_aux_loss_weight=...)]`."
                )
            self.get_decoder().training_state.trains_next_token_prediction = "sft" in names
            self._freeze_idle_mtp_layers()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the decorator `@use_experts_implementation` in the source of this file, but the
        # experts live in moe_dsv3.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """`"auto"` where nothing was asked for, or what the environment asks for; see `kernels/selection.py`."""
        return super().get_correct_experts_implementation(requested_experts or chosen["experts"])


def language_model_forward(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    inputs_embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    use_cache: bool | None,
    logits_to_keep: int | torch.Tensor,
    training_pass: TrainingPass | None = None,
    **kwargs: Any,
) -> Dsv3CausalLMOutputWithPast:
    """[`DeepseekV3ForCausalLM.forward`] of a model with `model` around or at its decoder, and `lm_head`.

    Args:
        kwargs: for `model.model`, such as pictures.
    """
    config = text_config(model.config)
    shift_labels = kwargs.get("shift_labels")
    ignore_index = kwargs.get("ignore_index", -100)
    skip_logits = kwargs.pop("skip_logits", None)
    keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    vocab_size: int = getattr(model.lm_head, "out_features", None) or config.vocab_size  # type: ignore[assignment]
    if labels is not None:
        check_labels(vocab_size, labels, tokens if keeps_all else None, ignore_index)
    targets = None
    if labels is not None:
        # Flat labels, as native takes them too, run on from row to row
        targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        if keeps_all and targets.numel() == tokens.shape[:2].numel():  # type: ignore[union-attr]
            targets = targets.reshape(tokens.shape[:2])  # type: ignore[union-attr]
    if targets is not None and ignore_index != -100:
        targets = targets.masked_fill(targets == ignore_index, -100)
    if training_pass is None and keeps_all and targets is not None:
        training_pass = make_training_pass(model, None, targets)
    if training_pass is not None:
        training_pass.loss_is_known = True
        kwargs["training_pass"] = training_pass
    outputs = model.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )
    kwargs.pop("training_pass", None)
    hidden_states = outputs.last_hidden_state
    hidden_states = kept_positions(hidden_states, logits_to_keep)

    loss = None
    logits: torch.Tensor | LazyLogits | None = None
    if targets is None:
        if model.training and torch.is_grad_enabled() and (config.mtp_loss_weight or config.seq_aux_loss_weight):
            logger.warning_once(
                "No labels reach the model in training (label smoothing or a loss function of the trainer's): the "
                "MTP and sequence-wise balance losses are left out."
            )
        logits = None if skip_logits else linear(model.lm_head, hidden_states)
    else:
        loss, logits = language_model_loss(
            model, hidden_states, labels, targets, training_pass, vocab_size, bool(skip_logits), kwargs
        )

    output_class = Dsv3LazyCausalLMOutputWithPast if type(logits) is LazyLogits else Dsv3CausalLMOutputWithPast
    return output_class(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        router_logits=getattr(outputs, "router_logits", None),  # native's of older releases has none
        mtp_loss=training_pass.mtp_loss if training_pass is not None else None,
        image_hidden_states=getattr(outputs, "image_hidden_states", None),
    )
