"""A model cut over the processes of a group: who has which weights, and steps of all of them together."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .arguments import PipelineArguments
from .partition import cut_model, describe_cut, modules_of, multiplied_weights
from .schedules import Schedules
from .stage import Microbatch, StageModule, split_batch


class Pipeline:
    """Stages of a model on the processes of a group, each of which was given the same whole model.

    The model keeps its modules and names on every process. Weights of other processes' stages are on the meta device
    afterwards; the routers' correction biases are everywhere, since all of them move by the counts of all processes.

    Args:
        model: a `DeepseekV3ForCausalLM`, cut in place.
        group: the pipeline's processes, whose time-out is that of a step.
        device: of this process. autocast: dtype of matrix products, None for that of the weights.

    Raises:
        OptionError: for a cut that the model does not have.
    """

    def __init__(
        self,
        model: Any,
        arguments: PipelineArguments,
        group: dist.ProcessGroup,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.arguments, self.group, self.device = model, arguments, group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        number = arguments.num_stages(self.size)
        parts = cut_model(model, arguments.cut, number)
        ranks = [arguments.rank_of(stage, self.size) for stage in range(number)]
        costs = {part: multiplied_weights(part, model) for stage in parts for part in stage}
        self.table = describe_cut(parts, ranks, costs)

        modules: dict[int, list[nn.Module]] = defaultdict(list)
        for stage, rank in enumerate(ranks):
            modules[rank] += [module for part in parts[stage] for module in modules_of(part, model)]
        self.holders = self._holders(modules)
        self._shared = self._groups_of_shared_weights()
        drop_weights(model, {name for name, holders in self.holders.items() if self.rank not in holders}, device)

        self.microbatches: list[Microbatch] = []
        stages = {
            stage: StageModule(model, parts[stage], self.microbatches, autocast)
            for stage, rank in enumerate(ranks)
            if rank == self.rank
        }
        self.head_rank = next(rank for stage, rank in zip(parts, ranks) if any(part.kind == "head" for part in stage))
        self.schedules = Schedules(
            arguments, stages, number, group, device, model.lm_head.weight.dtype, model.config.hidden_size
        )

    def _holders(self, modules: dict[int, list[nn.Module]]) -> dict[str, list[int]]:
        """The ranks that have each parameter. Names that stand for one tensor are held by the same."""
        ranks_of: dict[int, list[int]] = defaultdict(list)
        for rank in range(self.size):
            for identity in {id(parameter) for module in modules[rank] for parameter in module.parameters()}:
                ranks_of[identity].append(rank)
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: ranks_of[id(parameter)] for name, parameter in named}

    def _groups_of_shared_weights(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """The weights that this process shares with others, such as the embedding of the first stage and of MTP.

        Every process makes all groups, in the same order.
        """
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        shared = []
        timeout = timedelta(seconds=self.arguments.pipeline_timeout)
        for name, parameter in self.model.named_parameters():
            holders = tuple(self.holders[name])
            if len(holders) < 2:
                continue
            if holders not in groups:
                ranks = [dist.get_global_rank(self.group, rank) for rank in holders]
                groups[holders] = dist.new_group(ranks, timeout=timeout)
            if self.rank in holders:
                shared.append((parameter, groups[holders]))
        return shared

    def owns(self, name: str) -> bool:
        """Whether this process is the one that answers for a parameter, of those that have it."""
        return self.holders[name][:1] == [self.rank]

    def train_step(self, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        """Forward and backward of a batch; gradients are added to those there are.

        Args:
            inputs: the whole batch, the same on every process; see `Microbatch`.
            num_items: targets by which the sum of the losses is divided.

        Returns:
            The loss of next-token prediction, fp32, on every process.
        """
        rows, length = inputs["input_ids"].shape
        rows //= self.arguments.microbatches
        return self._step(inputs, rows, num_items, lambda: self.schedules.train(rows, length))

    @torch.no_grad()
    def evaluate(self, inputs: dict[str, torch.Tensor], rows: int, num_items: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, run in microbatches of so many rows, on every process."""

        def run() -> None:
            shapes = [tuple(batch.inputs["input_ids"].shape) for batch in self.microbatches]
            self.schedules.evaluate(shapes)  # type: ignore[arg-type]

        return self._step(inputs, rows, num_items, run)

    def _step(self, inputs: dict[str, torch.Tensor], rows: int, num_items: torch.Tensor, run: Any) -> torch.Tensor:
        self.microbatches[:] = split_batch(self.model, inputs, rows, num_items)
        run()
        losses = [batch.loss for batch in self.microbatches if batch.loss is not None]
        self.microbatches.clear()
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)
        dist.broadcast(loss, dist.get_global_rank(self.group, self.head_rank), group=self.group)
        return loss

    def sum_shared_gradients(self) -> None:
        """Gives each copy of a shared weight the gradient of all of them. Once for each step of the optimizer."""
        for parameter, group in self._shared:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=group)

    def clip_grad_norm(self, most: float) -> torch.Tensor:
        """Scales the gradients of all stages such that their norm is at most so much.

        Returns:
            The norm before, of all stages, on every process.
        """
        gradients, counted = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients.append(parameter)
                if self.owns(name):
                    counted.append(parameter.grad)
        norm = nn.utils.get_total_norm(counted) if counted else torch.zeros((), device=self.device)
        square = norm.to(self.device, torch.float32).square()
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        if gradients and most != float("inf"):
            nn.utils.clip_grads_with_norm_(gradients, most, norm)
        return norm


def drop_weights(model: nn.Module, absent: set[str], device: torch.device) -> None:
    """Moves a model to a device, but for the parameters of these names, whose memory is given back."""
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") in absent:
                empty = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            else:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
