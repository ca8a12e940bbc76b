"""Objectives of training beside next-token prediction, and what training keeps of them.

Multi-token prediction (arXiv 2412.19437, section 2.2) and sequence-wise balance (section 2.1.2) ride on tensors of the
decoder (`training_pass_dsv3`). Here is which of them a step trains, how the MTP layers' loss is computed, and the loss
of the language model itself, part by part where its logits would be large.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from .configuration_dsv3 import text_config
from .linear_dsv3 import linear
from .moe_dsv3 import DeepseekV3TopkRouter
from .mtp_dsv3 import same_sequence, second_token_acceptance, shift_left
from .outputs_dsv3 import LazyLogits
from .training_pass_dsv3 import (
    CarriedLoss,
    KnownLoss,
    RouterPass,
    TrainingPass,
    find_token_weight,
    mark,
    running,
    summed_cross_entropy,
)


logger = logging.get_logger(__name__)

# Logits of one training batch that are held at once, in bytes of fp32; with more, they are made part by part
LOGITS_BYTES = 2**29


@dataclass
class TrainingState:
    """What a decoder in training, its trainer's callbacks and the model around it tell each other.

    Attributes:
        trains_next_token_prediction: False in the hands of one of TRL's trainers for preferences or rewards.
        load_balancing_is_settled: whether something balances the experts' load, or need not, or its lack was said.
        mtp_totals: fp32, since it was last taken: sum of the MTP losses, their targets; second tokens compared, those
            accepted.
        losses_left_out: passes whose loss was not next-token prediction, so that MTP and balance losses were left out.
        config_before_training: what a training run changed in the config, to be put back when it ends.
    """

    trains_next_token_prediction: bool = True
    load_balancing_is_settled: bool = False
    mtp_totals: torch.Tensor | None = None
    losses_left_out: torch.Tensor | None = None
    config_before_training: dict[str, float] = field(default_factory=dict)


def freeze_idle_mtp_layers(decoder: Any, is_language_model: bool) -> None:
    """Keeps MTP layers that no loss reaches out of the optimizer, and out of what DistributedDataParallel awaits.

    Only what was frozen here is made trainable again, when `config.mtp_loss_weight` was set in the meantime: what
    users and adapters freeze in layers that train stays so. Of layers that were idle it cannot be told apart.

    Args:
        decoder: a `DeepseekV3Model`. is_language_model: whether the model around it is one.
    """
    trains = decoder.config.mtp_loss_weight > 0 and is_language_model
    trains = trains and decoder.training_state.trains_next_token_prediction
    for layer in decoder.mtp_layers:
        if not trains:
            layer.frozen_as_idle = layer.frozen_as_idle or layer.is_trained
            layer.requires_grad_(False)
        elif layer.frozen_as_idle:
            layer.requires_grad_(True)
            layer.frozen_as_idle = False


def carry_mtp_loss(
    decoder: Any,
    hidden_states: torch.Tensor,
    inputs_embeds: torch.Tensor,
    training_pass: TrainingPass,
    token_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    layer_inputs: dict[str, Any],
) -> torch.Tensor:
    """The last hidden state `(B, S, D)`, carrying the MTP layers' loss (equations 24 and 25).

    Args:
        decoder: a `DeepseekV3Model`. inputs_embeds: `(B, S, D)`, embeddings of the tokens the model ran on.
        token_mask: `(B, S)`, False for padding. position_ids: `(B or 1, S)`, where they were given.
    """
    head, targets = training_pass.head, training_pass.targets
    assert head is not None and targets is not None
    layers = decoder.mtp_layers
    at_once = max(LOGITS_BYTES // (4 * decoder.config.vocab_size), 1)
    previous, losses, numbers = hidden_states, [], []
    for depth, layer in enumerate(layers):
        fed = same_sequence(targets, depth + 1, position_ids, token_mask)
        router_pass = RouterPass(training_pass, fed.flatten())
        layer_inputs["position_ids"] = mark(layer_inputs["position_ids"], router_pass)
        with running(router_pass):
            previous = layer(previous, shift_left(inputs_embeds, depth + 1, 0.0), **layer_inputs)
        predicts = same_sequence(targets, depth + 2, position_ids, token_mask)
        layer_targets = shift_left(targets, depth + 1, -100).masked_fill(~predicts, -100)
        losses.append(summed_cross_entropy(previous, layer_targets, head, at_once))
        numbers.append(layer_targets.ne(-100).sum())
        if depth == 0:
            first_states, first_targets = previous, layer_targets
    total = torch.stack(losses).sum()
    with torch.no_grad():
        compared, accepted = second_token_acceptance(hidden_states, first_states, first_targets, head)
        means = torch.stack(losses) / torch.stack(numbers).clamp(min=1)
        training_pass.mtp_loss = means.mean()
        seen = torch.stack([total.float(), torch.stack(numbers).sum().float(), compared, accepted])
        state = decoder.training_state
        if state.mtp_totals is None or state.mtp_totals.device != seen.device:
            state.mtp_totals = torch.zeros_like(seen)
        state.mtp_totals += seen
    if training_pass.loss_is_known:
        training_pass.mtp_sum = total / len(layers)
        return hidden_states
    return CarriedLoss.apply(hidden_states, total, training_pass, training_pass.mtp_loss_weight / len(layers))


def await_loss(decoder: Any, hidden_states: torch.Tensor, training_pass: TrainingPass) -> torch.Tensor:
    """The last hidden state `(B, S, D)`, from whose gradient it is found out what a token weighs in a loss to come."""
    state = decoder.training_state
    if state.losses_left_out is None or state.losses_left_out.device != hidden_states.device:
        state.losses_left_out = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
    training_pass.left_out = state.losses_left_out
    return find_token_weight(hidden_states, training_pass)


def warn_of_unbalanced_training(decoder: Any) -> None:
    if decoder.training_state.load_balancing_is_settled or torch.compiler.is_compiling():
        return
    routers = (module for module in decoder.modules() if isinstance(module, DeepseekV3TopkRouter))
    if any(router.weight.requires_grad for router in routers):
        logger.warning_once(
            "Routers are trained, but nothing balances the load of their experts: give "
            "`transformers_dsv3.LoadBalancingCallback()` to the trainer, or call `move_correction_bias` of "
            "transformers_dsv3.training.load_balancing at each optimizer step."
        )
    decoder.training_state.load_balancing_is_settled = True


def make_training_pass(
    model: Any, labels: torch.Tensor | None, shift_labels: torch.Tensor | None = None
) -> TrainingPass | None:
    """The losses that this step trains beside next-token prediction, or None where there are none.

    Args:
        model: a `DeepseekV3ForCausalLM`. labels: `(B, S)`, -100 where there is no target.
        shift_labels: `(B, S)`, the same one place to the left, in its stead.
    """
    if labels is None and shift_labels is None:
        return None
    if not (model.training and torch.is_grad_enabled()):
        return None
    config, layers = text_config(model.config), model.get_decoder().mtp_layers
    # Frozen layers are those of users or adapters that train something else
    mtp_trains = bool(layers) and layers[0].is_trained
    mtp_loss_weight = config.mtp_loss_weight if mtp_trains else 0.0
    if not mtp_loss_weight and not config.seq_aux_loss_weight:
        return None
    if torch.compiler.is_compiling() and (config.seq_aux_loss_weight or "forward" in model.__dict__):
        raise ValueError(
            "Under torch.compile a sequence-wise balance loss cannot be carried, nor an MTP loss where the "
            "trainer computes the loss itself (TRL): set `seq_aux_loss_weight`, and there `mtp_loss_weight`, to "
            "0, or do not compile."
        )
    targets = shift_left(labels, 1, -100) if shift_labels is None else shift_labels
    return TrainingPass(targets, model.get_output_embeddings(), mtp_loss_weight, config.seq_aux_loss_weight)


def tell_decoder_the_targets(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook, for trainers that put a forward of their own in place of the class's.

    They keep the labels from the decoder. Hooks still run, and what they add to the arguments reaches it.
    """
    if not model.training or "forward" not in model.__dict__:
        return None  # the class's own forward sees the labels itself
    if kwargs.get("output_router_logits") and "trl" in (model.model_tags or ()):
        raise ValueError(
            "`output_router_logits=True` in training by a trainer that computes the loss itself (TRL's "
            "`router_aux_loss_coef` asks for them): it would compute Mixtral's loss over a softmax of these logits, "
            "but DeepSeek-V3's routers are sigmoid. Leave it out; to balance the experts, give SFTTrainer "
            "`callbacks=[transformers_dsv3.LoadBalancingCallback(seq_aux_loss_weight=...)]`."
        )
    state = model.get_decoder().training_state
    if not state.trains_next_token_prediction:
        state.load_balancing_is_settled = True
        return None
    training_pass = make_training_pass(model, kwargs.get("labels"), kwargs.get("shift_labels"))
    return None if training_pass is None else (args, {**kwargs, "training_pass": training_pass})


def language_model_loss(
    model: Any,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    targets: torch.Tensor,
    training_pass: TrainingPass | None,
    vocab_size: int,
    skip_logits: bool,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | LazyLogits | None]:
    """Loss and logits of a `DeepseekV3ForCausalLM`, whose own loss function may have been replaced.

    Args:
        hidden_states: `(B, S, D)`, those of which logits are asked for.
        labels: as they were given. targets: the same, one place to the left, -100 where there is none.
        vocab_size: tokens that the head knows.
        skip_logits: whether none are to be returned. kwargs: what else the loss function is given.

    Returns:
        The loss, fp32, a mean over targets, and the logits: in training, where they would be large, made part by part
        for the loss, and lazily for the caller.
    """
    own_loss = model.loss_function is ForCausalLMLoss
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None:
        num_items = targets.ne(-100).sum()
    # A loss of 0, not of 0 / 0, where there is no target
    num_items = torch.as_tensor(num_items, device=hidden_states.device)
    num_items = torch.where(num_items == 0, 1, num_items)
    at_once = max(LOGITS_BYTES // (4 * vocab_size), 1)
    if (
        model.training
        and own_loss
        and targets.shape == hidden_states.shape[:2]
        and (targets.numel() > at_once or skip_logits)
    ):
        loss = summed_cross_entropy(hidden_states, targets, model.lm_head, at_once) / num_items
        logits: torch.Tensor | LazyLogits | None = None
        if not skip_logits and torch.compiler.is_compiling():
            logits = linear(model.lm_head, hidden_states)
        elif not skip_logits:
            logits = LazyLogits(model.lm_head, hidden_states)
    else:
        logits = made = linear(model.lm_head, hidden_states)
        if own_loss:
            kwargs["num_items_in_batch"] = num_items
        loss = model.loss_function(
            logits=made,
            labels=labels,
            vocab_size=made.shape[-1] if own_loss else text_config(model.config).vocab_size,
            **kwargs,
        )
    if training_pass is not None:
        # Taken out: the graph behind it holds the pass, and a pass that holds the graph would never be freed
        mtp_sum, training_pass.mtp_sum = training_pass.mtp_sum, None
        if mtp_sum is not None:
            mtp_loss = training_pass.mtp_loss_weight * mtp_sum / num_items
            loss = loss + (mtp_loss - mtp_loss.detach())  # its gradient, and nothing of its value
        if training_pass.seq_aux_loss_weight:
            loss = KnownLoss.apply(loss, training_pass, num_items)
    return loss, logits
