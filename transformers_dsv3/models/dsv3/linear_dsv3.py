"""Linear layers and the dense network, served by a compiled backend where one takes the call."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from ...kernels.experts_cpu import mixture, mixture_refusal
from ...kernels.linear_cpu import linear, linear_refusal


class Dsv3Linear(nn.Linear):
    """`nn.Linear`; a few rows on a CPU, as in decoding, go to the compiled backend."""

    is_plain_linear = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., K)` to `(..., N)`."""
        if linear_refusal(input, self.weight) is None:
            return linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class Dsv3MLP(DeepseekV3MLP):
    """The SwiGLU network of dense layers and of shared experts; in one pass where the compiled backend takes it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        if mixture_refusal(hidden_states, None, self) is None:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            return mixture(flat, None, None, None, self).view(hidden_states.shape)
        return super().forward(hidden_states)
