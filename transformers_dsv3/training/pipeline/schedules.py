"""PyTorch's pipeline schedules, one for each shape of microbatches, and a forward pass of its own for evaluation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining

from ...kernels.weight_gradients import WeightGradients, putting_off
from .arguments import PipelineArguments
from .stage import StageModule


# Each has buffers for the hidden states of all microbatches
_SHAPES_KEPT = 8


def _pass_on(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss function of a schedule whose last stage gives the loss."""
    return output


class Schedules:
    """A step of training, or of evaluation, through the stages of all processes of a group.

    Args:
        stages: those of this process, by their number.
        num_stages: of all processes.
        group: the pipeline's processes. device, dtype: of hidden states, which have `hidden_size` features.
    """

    def __init__(
        self,
        arguments: PipelineArguments,
        stages: dict[int, StageModule],
        num_stages: int,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        hidden_size: int,
    ):
        self.arguments = arguments
        self.stages = stages
        self.num_stages = num_stages
        self.group = group
        self.device = device
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.weight_gradients = WeightGradients() if arguments.kind.splits_backward else None
        self._by_shape: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def _rank_of(self, stage: int) -> int:
        """Global rank of the process that has a stage."""
        return dist.get_global_rank(self.group, self.arguments.rank_of(stage, self.group.size()))

    def _make(self, rows: int, length: int) -> Any:
        """PyTorch's schedule for microbatches of `rows` rows of `length` tokens.

        Shapes are told beforehand: PyTorch would find them by a forward pass on whatever memory holds, whose choices
        the routers would count.
        """

        def hidden_states() -> torch.Tensor:
            shape = (rows, length, self.hidden_size)
            return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

        stages = []
        for index, module in self.stages.items():
            is_last = index == self.num_stages - 1
            loss = torch.empty((), device="meta", requires_grad=True)
            stages.append(
                pipelining.PipelineStage(
                    module,
                    index,
                    self.num_stages,
                    self.device,
                    input_args=torch.zeros(1, dtype=torch.int64) if index == 0 else hidden_states(),
                    output_args=loss if is_last else hidden_states(),
                    group=self.group,
                    dw_builder=self.weight_gradients and self.weight_gradients.take,
                )
            )
        schedule = pipelining.schedules.get_schedule_class(self.arguments.kind.torch_name)
        single = self.arguments.stages_per_rank == 1
        return schedule(
            stages[0] if single else stages, self.arguments.microbatches, loss_fn=_pass_on, scale_grads=False
        )

    def train(self, rows: int, length: int) -> None:
        """Forward and backward of all microbatches, which the stages know; gradients are added to those there are."""
        shape = rows, length
        if shape not in self._by_shape:
            if len(self._by_shape) == _SHAPES_KEPT:
                self._by_shape.popitem(last=False)
            self._by_shape[shape] = self._make(*shape)
        self._by_shape.move_to_end(shape)
        numbers = torch.arange(self.arguments.microbatches)
        given = (numbers,) if 0 in self.stages else ()
        with putting_off(self.weight_gradients):
            self._by_shape[shape].step(*given, target=numbers, return_outputs=False, microbatch=numbers)

    def evaluate(self, shapes: list[tuple[int, int]]) -> None:
        """Forward of microbatches of these rows and lengths, which the stages know.

        Every stage takes all microbatches in their order, and the stages of a process follow each other: whatever is
        waited for was begun before.
        """
        sent: list[tuple[dist.Work | None, torch.Tensor]] = []
        ready: dict[tuple[int, int], torch.Tensor] = {}
        for index, stage in self.stages.items():
            for number, shape in enumerate(shapes):
                if index == 0:
                    carried = torch.empty(0)
                elif index - 1 in self.stages:
                    carried = ready.pop((index, number))
                else:
                    carried = torch.empty((*shape, self.hidden_size), dtype=self.dtype, device=self.device)
                    dist.recv(carried, self._rank_of(index - 1), group=self.group)
                output = stage(carried, torch.tensor([number]))
                if index + 1 in self.stages:
                    ready[index + 1, number] = output
                elif index + 1 < self.num_stages:
                    sent.append((dist.isend(output, self._rank_of(index + 1), group=self.group), output))
        for work, _ in sent:
            if work is not None:
                work.wait()
