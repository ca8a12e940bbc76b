"""Expert-specialised fine-tuning: train the few routed experts that a domain's text uses, and nothing else.

Wang et al., arXiv 2407.01906, section 3. Scores of the experts on the domain's text (`score_experts`) choose the
smallest set in each layer that reaches a share p of the layer's total (`ExpertScores.select`).
`train_selected_experts` freezes everything else, and `ESFTCallback` does so under `Trainer` and TRL's `SFTTrainer`.

The experts of a layer are stacked in one tensor, of which `requires_grad` cannot freeze a part. So every selected
expert becomes a parameter of its own that is a view of its slice: an optimizer that steps on it writes into the stack,
which is itself frozen. Optimizers hold state for selected experts alone, no weight decay or moment reaches the others,
and the model's state dict is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..models.dsv3.moe_dsv3 import DeepseekV3Experts
from .expert_scores import SELECTION_FILE, ExpertScores, ExpertSelection, mixture_layers, score_experts


STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LayerShare:
    """Of one layer: selected experts of all, and trained parameters of all."""

    selected: int
    experts: int
    trained: int
    total: int


@dataclass(frozen=True)
class TrainedShare:
    """What is trained: the mixture-of-experts layers by number, and parameters of the whole model, MTP layers too.

    As a string, a line for each layer.
    """

    layers: dict[int, LayerShare]
    trained: int
    total: int

    def __str__(self) -> str:
        lines = [
            f"layer {number}: {layer.selected} of {layer.experts} experts, {layer.trained:,} of {layer.total:,} "
            f"parameters ({layer.trained / layer.total:.1%})"
            for number, layer in self.layers.items()
        ]
        return "\n".join([*lines, f"in all: {self.trained:,} of {self.total:,} ({self.trained / self.total:.1%})"])


def train_selected_experts(model: nn.Module, selection: ExpertSelection) -> TrainedShare:
    """Makes the selected experts the only parameters of a model that train, in place.

    To be called before the optimizer is made. Called again it replaces the selection. Weights and state dict stay as
    they are: the model saves, loads and generates as before. The method is that of arXiv 2407.01906, section 3.

    Args:
        model: a model of this package, in any dtype that trains.
        selection: the experts of each mixture layer, from `ExpertScores.select` or from a file.

    Returns:
        How many parameters train, layer by layer, of how many.

    Raises:
        ValueError: the selection is of other layers or another number of experts than the model's; the model has no
            mixture-of-experts layers of this package, is wrapped by PEFT, or its experts are sharded or quantised.
    """
    base, mixtures = mixture_layers(model)
    if selection.n_experts != base.config.n_routed_experts:
        raise ValueError(
            f"The selection is of {selection.n_experts} experts a layer, the model has {base.config.n_routed_experts}."
        )
    if set(selection.experts) != set(mixtures):
        raise ValueError(
            f"The selection is of layers {sorted(selection.experts)}, the model's mixture-of-experts layers are "
            f"{sorted(mixtures)}."
        )
    for layer, mixture in mixtures.items():
        _check_experts(mixture.experts, layer)
    for mixture in mixtures.values():
        if isinstance(mixture.experts, SelectedExperts):
            mixture.experts.release()
    total = sum(parameter.numel() for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for mtp_layer in base.mtp_layers:
        mtp_layer.frozen_as_idle = False  # else a weight of their loss would make them trainable again
    shares = {}
    for layer, mixture in mixtures.items():
        layer_total = sum(parameter.numel() for parameter in base.layers[layer].parameters())
        experts = SelectedExperts.take_over(mixture.experts, selection.experts[layer])
        trained = sum(view.numel() for _, view in experts.views())
        shares[layer] = LayerShare(len(selection.experts[layer]), selection.n_experts, trained, layer_total)
    return TrainedShare(shares, sum(share.trained for share in shares.values()), total)


class ESFTCallback(TrainerCallback, ExportableState):
    """Trains the selected experts alone under `Trainer` or TRL's `SFTTrainer`.

    ```python
    selection = score_experts(model, batches).select(by="token", p=0.2)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[ESFTCallback(selection)])
    ```

    Everything else (attention, shared experts, dense layers, embeddings, routers and their correction bias, MTP
    layers) is frozen when the trainer is made, before the optimizer is. The checkpoints are official ones with the
    selection beside them in `esft_selection.json`; a run resumes from them exactly, and with no other selection.

    Args:
        selection: what to train.

    Attributes:
        share: [`TrainedShare`], once the trainer is made.

    Raises:
        ValueError: when the trainer is made, for what [`train_selected_experts`] refuses; when training begins, for a
            trainer that was given the callback later or with `model_init`, for FSDP, DeepSpeed, several GPUs in one
            process, or a checkpoint of another selection.
    """

    def __init__(self, selection: ExpertSelection):
        self.selection = selection
        self.share: TrainedShare | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"selection": self.selection.to_dict()}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if kwargs["model"] is not None:
            self.share = train_selected_experts(kwargs["model"], self.selection)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process for each, with `accelerate launch`."
            )
        selected = [module for module in model.modules() if isinstance(module, SelectedExperts)]
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not selected or not all(id(view) in stepped for experts in selected for _, view in experts.views()):
            raise ValueError(
                "The optimizer was made without the selected experts. Give ESFTCallback to the trainer when it is "
                "made, in `callbacks`; with `model_init`, let it call `train_selected_experts`."
            )
        if not all(experts.is_tied() for experts in selected):
            raise ValueError(
                "The selected experts are not views of their layer's weights any more: FSDP and DeepSpeed move "
                "parameters, and are not supported by ESFTCallback."
            )
        if state.global_step and state.stateful_callbacks.get(type(self).__name__) != self.state():
            raise ValueError(
                "The checkpoint is of a run that trained other experts, and so is the optimizer's state: load the "
                f"`{SELECTION_FILE}` beside it."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.selection.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class SelectedExperts(DeepseekV3Experts):
    """[`DeepseekV3Experts`] of which some are parameters of their own, `gate_up_proj_of_3` and so on, views of stacks.

    Modules become this by `take_over`. The stacks are frozen, and keep their names and all weights.
    """

    selected: tuple[int, ...]

    @staticmethod
    def take_over(experts: DeepseekV3Experts, selected: Iterable[int]) -> SelectedExperts:
        """Turns a module into one that trains the experts `selected`, in place."""
        experts.__class__ = SelectedExperts
        assert isinstance(experts, SelectedExperts)
        experts.selected = tuple(sorted(selected))
        for name in STACKS:
            stack = experts._parameters[name]
            assert stack is not None
            for expert in experts.selected:
                experts.register_parameter(f"{name}_of_{expert}", nn.Parameter(stack.detach()[expert]))
        return experts

    def release(self) -> None:
        """Back to plain experts, with the weights as they are now."""
        for name in [name for name, _ in self.views()]:
            del self._parameters[name]
        del self.selected
        self.__class__ = DeepseekV3Experts  # type: ignore[assignment]

    def slices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of the selected experts' parameters and their places in the stacks."""
        for name in STACKS:
            stack = self._parameters[name]
            assert stack is not None
            for expert in self.selected:
                yield f"{name}_of_{expert}", stack.detach()[expert]

    def views(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the selected experts."""
        for name in STACKS:
            for expert in self.selected:
                view = self._parameters[f"{name}_of_{expert}"]
                assert view is not None
                yield f"{name}_of_{expert}", view

    def is_tied(self) -> bool:
        """Whether every parameter still is a view of its place."""
        pairs = zip(self.views(), self.slices(), strict=True)
        return all(view.data_ptr() == place.data_ptr() for (_, view), (_, place) in pairs)

    def _tie(self) -> None:
        for (_, view), (_, place) in zip(self.views(), self.slices(), strict=True):
            view.data = place

    def _apply(self, fn: Callable, recurse: bool = True) -> SelectedExperts:
        """`.to` and the like give every parameter memory of its own."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """So do `copy.deepcopy` and unpickling."""
        super().__setstate__(state)
        self._tie()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, _ in self.views():
            del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + name for name, _ in self.views()}
        missing_keys[:] = [key for key in missing_keys if key not in own]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See [`DeepseekV3Experts.forward`], which it is, whatever the implementation."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        stacks = {name: self._parameters[name] for name in STACKS}
        try:
            for name, stack in stacks.items():
                views = [self._parameters[f"{name}_of_{expert}"] for expert in self.selected]
                # What every backend reads as the module's weight, for this call
                self._parameters[name] = _StackOfViews.apply(stack, self.selected, *views)
            return super().forward(hidden_states, top_k_index, top_k_weights)
        finally:
            self._parameters.update(stacks)

    # Where Transformers' registered experts functions fall back to, as on the class itself
    forward.__wrapped__ = DeepseekV3Experts.forward.__wrapped__  # type: ignore[attr-defined]


class _StackOfViews(torch.autograd.Function):
    """A stack `(E, …)` as it is, whose gradient goes to the parameters that are views of it; nothing is copied."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, selected: tuple[int, ...], *views: torch.Tensor) -> torch.Tensor:
        ctx.selected = selected
        return stack.detach()

    @staticmethod
    def backward(ctx: Any, grad_stack: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Clones, since a slice that is kept as a gradient would keep the gradient of all experts
        return (None, None, *(grad_stack[expert].clone() for expert in ctx.selected))


def _check_experts(experts: nn.Module, layer: int) -> None:
    stacks = [experts._parameters.get(name) for name in STACKS]
    if not isinstance(experts, DeepseekV3Experts) or not all(
        type(stack) is nn.Parameter and stack.is_floating_point() and not stack.is_meta for stack in stacks
    ):
        raise ValueError(
            f"The experts of layer {layer} are a {type(experts).__name__} whose weights are not plain floating-point "
            "parameters in memory: sharded, quantised, offloaded or adapted experts cannot be trained one by one."
        )


__all__ = [
    "ESFTCallback",
    "ExpertScores",
    "ExpertSelection",
    "SelectedExperts",
    "TrainedShare",
    "score_experts",
    "train_selected_experts",
]
