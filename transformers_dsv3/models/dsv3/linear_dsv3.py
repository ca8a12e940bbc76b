"""Linear layers and the dense network, served by a faster backend where one takes the call.

Every linear layer is exactly `nn.Linear`, which quantisers and adapters look for. So what is faster than its own
forward stands where the layer is called: in `linear`, and in the modules that run several layers at once.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels.backends import LINEAR, MLP
from ...kernels.dispatch import serve
from ...kernels.selection import register_plain, switched_off
from ...kernels.weight_gradients import call_linear
from .configuration_dsv3 import DeepseekV3Config


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, `(..., K)` to `(..., N)`.

    Of a plain `nn.Linear` on a CPU a few rows, as in decoding, go to the compiled backend, and fp32 training to
    oneDNN. Whatever else stands in its place, or is hooked, is called.
    """
    if type(layer) is not nn.Linear:
        layer = switched_off(layer)
    if type(layer) is nn.Linear:
        y = serve(LINEAR, layer, x, layer.weight, None, layer.bias, False)
        if y is not None:
            return y
    return call_linear(layer, x)


NATIVE_FORWARD = native.DeepseekV3MLP.forward


class DeepseekV3MLP(native.DeepseekV3MLP):
    """The SwiGLU network of dense layers and of shared experts; in one pass where the compiled backend takes it.

    Args:
        intermediate_size: `config.intermediate_size` unless given.
    """

    def __init__(self, config: DeepseekV3Config, intermediate_size: int | None = None):
        nn.Module.__init__(self)  # not the parent's: Liger-Kernel may have put another class in its place
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        y = serve(MLP, self, x, self)
        if y is not None:
            return y
        if native.DeepseekV3MLP.forward is not NATIVE_FORWARD:
            return super().forward(x)  # what somebody has put there
        return linear(self.down_proj, self.act_fn(linear(self.gate_proj, x)) * linear(self.up_proj, x))


register_plain("mlp", DeepseekV3MLP, native.DeepseekV3MLP)

Dsv3MLP = DeepseekV3MLP  # its name before
