"""Model outputs: logits that are made when they are read, and the MTP loss."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


class LazyLogits:
    """Logits that nobody has asked for yet.

    Args:
        head: from hidden states to logits. hidden_states: `(B, S, D)`, with its graph.
    """

    def __init__(self, head: nn.Module, hidden_states: torch.Tensor):
        self.head, self.hidden_states = head, hidden_states
        self.with_gradients = torch.is_grad_enabled()

    def __call__(self) -> torch.Tensor:
        """`(B, S, vocabulary)`, with gradients where the pass had them, whoever reads it."""
        with torch.set_grad_enabled(self.with_gradients):
            return self.head(self.hidden_states)


@dataclass
class Dsv3CausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """[`MoeCausalLMOutputWithPast`] and, while training with `config.mtp_loss_weight`, the MTP loss.

    Args:
        mtp_loss (`torch.FloatTensor`, a scalar): mean over the MTP layers' targets and over the MTP layers, not
            weighted, without gradient. Not in `loss`: its gradient joins in `loss.backward()`, see
            `training_pass_dsv3.py`.
        image_hidden_states (`torch.FloatTensor`): of models with a vision tower, what became of the pictures, of the
            decoder's width; see native's output of that model.
    """

    mtp_loss: torch.FloatTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class Dsv3LazyCausalLMOutputWithPast(Dsv3CausalLMOutputWithPast):
    """The same after a loss that was computed part by part: `logits` are made when they are first read.

    As an attribute, by name, by place, or with everything else that a loop over the output reads. So a training step
    that reads the loss alone never holds them. Given as [`LazyLogits`].
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # which looks at every field
        object.__setattr__(self, "_is_made", True)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and type(value) is LazyLogits and "_is_made" in self.__dict__:
            value = value()
            self.logits = value  # also as an entry of the dictionary
        return value

    def __getitem__(self, key: Any) -> Any:
        self.logits  # noqa: B018  makes them
        return super().__getitem__(key)

    def items(self) -> ItemsView[str, Any]:
        self.logits  # noqa: B018
        return super().items()

    def values(self) -> ValuesView[Any]:
        self.logits  # noqa: B018
        return super().values()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def to_tuple(self) -> tuple:
        self.logits  # noqa: B018
        return super().to_tuple()

    def __reduce__(self) -> Any:
        self.logits  # noqa: B018
        return super().__reduce__()

    def __repr__(self) -> str:
        self.logits  # noqa: B018
        return super().__repr__()
