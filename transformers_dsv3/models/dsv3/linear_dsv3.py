"""Linear layers and the dense network, served by a faster backend where one takes the call."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from ...kernels import linear_cpu, linear_onednn
from ...kernels.experts_cpu import mixture, mixture_refusal
from .configuration_dsv3 import Dsv3Config


class Dsv3Linear(nn.Linear):
    """`nn.Linear`; on a CPU a few rows, as in decoding, go to the compiled backend, and fp32 training to oneDNN."""

    is_plain_linear = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., K)` to `(..., N)`."""
        if not self.training and linear_cpu.linear_refusal(input, self.weight, self.bias) is None:
            return linear_cpu.linear(input, self.weight, self.bias)
        if linear_onednn.linear_refusal(input, self.weight) is None:
            return linear_onednn.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class Dsv3MLP(DeepseekV3MLP):
    """The SwiGLU network of dense layers and of shared experts; in one pass where the compiled backend takes it.

    Args:
        intermediate_size: `config.intermediate_size` unless given.
    """

    def __init__(self, config: Dsv3Config, intermediate_size: int | None = None):
        nn.Module.__init__(self)  # not the parent's, which makes PyTorch's linear layers
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = Dsv3Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = Dsv3Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = Dsv3Linear(self.intermediate_size, self.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        if not self.training and mixture_refusal(hidden_states, None, None, self) is None:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            return mixture(flat, None, None, None, self).view(hidden_states.shape)
        return super().forward(hidden_states)
