"""What one forward pass in training shares with its backward pass.

That is the routers' choices, and losses beside next-token prediction: multi-token prediction (arXiv 2412.19437,
section 2.2) and sequence-wise balance (section 2.1.2). They are not added to a loss value: trainers such as TRL's run
the decoder and the output head themselves, and a term added in `forward` of the language model would be lost. They
ride on tensors of the decoder instead, which pass through unchanged while their gradient is joined by that of the loss
they carry.

What such a gradient is to be multiplied with (gradient accumulation, averaging over ranks, loss scaling) is known when
the backward pass begins, and the same for all: the weight of one predicted token in the loss that is differentiated.

Where the model computes the loss itself, the MTP loss is added to it less its own value, which needs none of this and
can be compiled.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from ...kernels.weight_gradients import call_linear


logger = logging.get_logger(__name__)

# Predicted tokens at which the gradient of a loss that is computed elsewhere is compared with that of next-token
# prediction, divided among the rows of a batch
PROBES = 16
# Largest share of that gradient's square that may be of another direction: bf16 logits leave some thousandths
FOREIGN_SHARE = 0.05


class TrainingPass:
    """One forward pass in training, which the routers of every layer know (see `pass_of`).

    Args:
        targets: `(B, S)`, the token that each position predicts, -100 where there is none; None where no loss beside
            the main one is to be carried.
        head: the output head that MTP layers share.
        mtp_loss_weight, seq_aux_loss_weight: those of the config, as they are at this step.

    Attributes:
        token_weight: factor of one token's negative log-likelihood in what is differentiated, a scalar. Known once the
            backward pass has begun; None before, and where that loss is not next-token prediction.
        loss_is_known: whether the model's own `forward` computes the loss; else `token_weight` is found from the
            gradient of the last hidden state.
        choices: `(T, K)` expert indices by router. A layer that is computed again under gradient checkpointing takes
            them from here, so that it does not choose, or count, a second time.
        sequence_ids: `(T,)`, the number of each token's sequence, where `seq_aux_loss_weight` needs it.
        sequence_weights: `(N,)`, how many targets each of the sequences has.
        left_out: counter on the loss's device of the passes that carried nothing, since the loss was another one.
        mtp_sum: sum of the MTP losses over their targets, mean over the layers, where the loss is known.
        mtp_loss: mean over targets and MTP layers, without its weight and gradient.
    """

    def __init__(
        self,
        targets: torch.Tensor | None = None,
        head: nn.Module | None = None,
        mtp_loss_weight: float = 0.0,
        seq_aux_loss_weight: float = 0.0,
    ):
        self.targets = targets
        self.head = head
        self.mtp_loss_weight = mtp_loss_weight
        self.seq_aux_loss_weight = seq_aux_loss_weight
        self.token_weight: torch.Tensor | None = None
        self.loss_is_known = False
        self.choices: dict[nn.Module, torch.Tensor] = {}
        self.sequence_ids: torch.Tensor | None = None
        self.sequence_weights: torch.Tensor | None = None
        self.left_out: torch.Tensor | None = None
        self.mtp_sum: torch.Tensor | None = None
        self.mtp_loss: torch.Tensor | None = None

    def number_sequences(self, batch_size: int, length: int, position_ids: torch.Tensor | None) -> None:
        """Numbers the sequences of a batch, and notes how many tokens each predicts.

        Args:
            position_ids: `(B or 1, S)`; where they do not run on, another packed sequence begins.
        """
        if self.targets is None or not self.seq_aux_loss_weight:
            return
        starts = torch.zeros(batch_size, length, dtype=torch.long, device=self.targets.device)
        starts[:, 0] = 1
        if position_ids is not None:
            starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        self.sequence_ids = starts.flatten().cumsum(0) - 1
        number = batch_size if position_ids is None else int(self.sequence_ids[-1]) + 1
        predicted = self.targets.ne(-100).flatten().float()
        self.sequence_weights = predicted.new_zeros(number).index_add_(0, self.sequence_ids, predicted)

    def sequence_balance_loss(
        self, scores_TE: torch.Tensor, top_k: int, token_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Sum over the sequences of the balance loss (equations 17 to 20) without α, times the tokens each predicts.

        Args:
            scores_TE: sigmoid scores, fp32.
            top_k: experts chosen for each token.
            token_mask: `(T,)`, False for tokens that do not count.
        """
        if self.sequence_ids is None or self.sequence_weights is None:
            return None
        number, num_experts = len(self.sequence_weights), scores_TE.shape[1]
        counted_T1 = torch.ones_like(scores_TE[:, :1]) if token_mask is None else token_mask[:, None].to(scores_TE)
        shares_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True) * counted_T1
        # The most fitting experts by score alone: the bias is no part of this loss
        best_TK = scores_TE.detach().topk(top_k, dim=1, sorted=False)[1]
        best_TE = torch.zeros_like(scores_TE).scatter_(1, best_TK, 1.0) * counted_T1

        def by_sequence(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(number, values.shape[1]).index_add(0, self.sequence_ids, values)

        tokens_N = by_sequence(counted_T1)[:, 0].clamp(min=1)
        products_N = (by_sequence(best_TE) * by_sequence(shares_TE)).sum(dim=1)
        return (self.sequence_weights * products_N * num_experts / (top_k * tokens_N.square())).sum()


@dataclass
class RouterPass:
    """What routers know of the pass that they are part of.

    Args:
        token_mask: `(T,)`, False for tokens that do not count, such as padding.
    """

    training_pass: TrainingPass
    token_mask: torch.Tensor | None = None


class _Current(threading.local):
    """The pass under way in this thread."""

    def __init__(self) -> None:  # runs once a thread; a class's attribute would look another one to `torch.compile`
        self.router_pass: RouterPass | None = None


_current = _Current()
# An attribute of the `position_ids` that every layer of a pass is given
_MARK = "_dsv3_router_pass"


def current_router_pass() -> RouterPass | None:
    """The pass that a router in training is part of, if a model runs it."""
    return _current.router_pass


class running:
    """Makes a pass the one under way."""

    def __init__(self, router_pass: RouterPass | None):
        self.router_pass = router_pass
        self.before: RouterPass | None = None

    def __enter__(self) -> None:
        self.before, _current.router_pass = _current.router_pass, self.router_pass

    def __exit__(self, *exception: object) -> None:
        _current.router_pass = self.before


def mark(position_ids: torch.Tensor, router_pass: RouterPass) -> torch.Tensor:
    """The same positions, by which layers find their pass.

    Modules are called with native's arguments alone, since what stands in their place knows no others. So a layer that
    gradient checkpointing computes again, after other passes perhaps, knows its own by what it was given then.
    """
    if torch.compiler.is_compiling():
        return position_ids  # a compiled layer is not computed again by Python
    position_ids = position_ids.view_as(position_ids)  # not the caller's own tensor
    setattr(position_ids, _MARK, router_pass)
    return position_ids


def pass_of(position_ids: torch.Tensor | None) -> running:
    """Makes the pass that `mark` put on a layer's positions the one under way, where there is one."""
    if torch.compiler.is_compiling():
        return running(_current.router_pass)
    return running(getattr(position_ids, _MARK, _current.router_pass))


class CarriedLoss(torch.autograd.Function):
    """Lets a tensor through, and on the way back sends a loss its gradient: `factor` times the weight of a token."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, carrier: torch.Tensor, loss: torch.Tensor, training_pass: TrainingPass, factor: float
    ) -> torch.Tensor:
        ctx.training_pass, ctx.factor, ctx.loss_like = training_pass, factor, loss.new_zeros(())
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        weight = ctx.training_pass.token_weight
        loss_grad = ctx.loss_like if weight is None else (weight * ctx.factor).to(ctx.loss_like)
        return grad, loss_grad, None, None


class KnownLoss(torch.autograd.Function):
    """Lets the model's own loss through, and notes on the way back what a token weighs in it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: torch.Tensor, training_pass: TrainingPass, num_items: torch.Tensor | float
    ) -> torch.Tensor:
        ctx.training_pass, ctx.num_items = training_pass, num_items
        return loss.clone()  # `Trainer` scales it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        ctx.training_pass.token_weight = grad / ctx.num_items
        return grad, None, None


class FoundLoss(torch.autograd.Function):
    """Lets the last hidden state through, and finds on the way back what a token weighs in a loss computed elsewhere.

    At some positions the gradient of a token's negative log-likelihood is known beforehand. Where the gradient that
    comes back is one multiple of them all, that multiple is the weight. Where it is not (preference losses,
    distillation, weighted tokens), the loss is another one, and nothing is carried.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: torch.Tensor,
        training_pass: TrainingPass,
        positions: torch.Tensor,
        expected_PD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.training_pass = training_pass
        ctx.save_for_backward(positions, expected_PD)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        positions, expected_PD = ctx.saved_tensors
        seen_PD = grad.flatten(0, 1)[positions].to(expected_PD)
        # Loss scaling may bring fp32 near its limits when squared
        scale = seen_PD.abs().amax().clamp(min=torch.finfo(seen_PD.dtype).tiny)
        seen_PD = seen_PD / scale
        weight = (seen_PD * expected_PD).sum() / expected_PD.square().sum().clamp(min=1e-20)
        foreign = (seen_PD - weight * expected_PD).square().sum()
        is_prediction = foreign <= FOREIGN_SHARE * seen_PD.square().sum()
        if ctx.training_pass.left_out is not None:
            ctx.training_pass.left_out += (~is_prediction & seen_PD.isfinite().all()).long()
        if grad.device.type == "cpu" and not is_prediction and bool(grad.isfinite().all()):
            logger.warning_once(
                "The loss is not next-token prediction with equal weights: MTP and sequence-wise balance losses are "
                "left out."
            )
        # NaN compares false: nothing is carried then
        ctx.training_pass.token_weight = torch.where(is_prediction, weight * scale, torch.zeros_like(weight))
        return grad, None, None, None


def find_token_weight(hidden_states: torch.Tensor, training_pass: TrainingPass) -> torch.Tensor:
    """The last hidden state `(B, S, D)`, prepared for `FoundLoss`."""
    targets, head = training_pass.targets, training_pass.head
    if targets is None or head is None:
        return hidden_states
    batch_size, length = targets.shape
    # The first targets of each row, without the host knowing where they are; rows with fewer get none in their place
    per_row = min(max(PROBES // batch_size, 1), length)
    there, columns = targets.ne(-100).int().topk(per_row, dim=1)
    positions = (columns + torch.arange(batch_size, device=targets.device)[:, None] * length).flatten()
    labels = targets.flatten()[positions].masked_fill(there.flatten() == 0, -100)
    with torch.enable_grad():
        probes = hidden_states.detach().flatten(0, 1)[positions].requires_grad_()
        losses = F.cross_entropy(head(probes).float(), labels, reduction="sum")
        (expected,) = torch.autograd.grad(losses, probes)
    return FoundLoss.apply(hidden_states, training_pass, positions, expected.float())


def summed_cross_entropy(
    hidden_states: torch.Tensor, targets: torch.Tensor, head: nn.Module, positions_at_once: int
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of targets, in fp32, with logits of some positions at a time.

    Logits are made again in the backward pass, where there is more than one part, so that no more than one part's are
    ever held.

    Args:
        hidden_states: `(B, S, D)`. targets: `(B, S)`, -100 where there is none.
        positions_at_once: how many of the B * S positions make one part.
    """

    def part_loss(hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(call_linear(head, hidden_TD).float(), targets_T, reduction="sum")

    hidden_TD, targets_T = hidden_states.flatten(0, 1), targets.flatten()
    if hidden_TD.shape[0] <= positions_at_once:
        return part_loss(hidden_TD, targets_T)
    losses = [
        torch.utils.checkpoint.checkpoint(part_loss, hidden, target, use_reentrant=False)
        for hidden, target in zip(hidden_TD.split(positions_at_once), targets_T.split(positions_at_once))
    ]
    return torch.stack(losses).sum()
