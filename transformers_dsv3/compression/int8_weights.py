"""INT8 weights with a scale for each output channel: half the memory of bf16, and half of what decoding has to read.

A weight row w is kept as round(w / s) with s = max|w| / 127, in fp32. Activations meet it as whole numbers of 16 bits
with a scale for each row, which lose less than bf16 does, or, with `activations="int8"` and many rows at once, of 8
bits, which multiply about twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.backends import LINEAR
from ..kernels.cpu.linear import FEWEST_INT8_ROWS
from ..kernels.dispatch import serve
from ..kernels.experts_auto import serve_experts
from ..kernels.selection import register_plain
from ..models.dsv3.moe_dsv3 import DeepseekV3Experts


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to whole numbers.

    Args:
        weight: `(..., N, K)`, any floating dtype.

    Returns:
        int8 `(..., N, K)` and fp32 scales `(..., N)`; a row of zeros has scale 1.
    """
    exact = weight.detach().float()
    scale = exact.abs().amax(dim=-1) / 127 if weight.shape[-1] else exact.new_zeros(weight.shape[:-1])
    scale = torch.where(scale > 0, scale, 1.0)
    return (exact / scale.unsqueeze(-1)).round_().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What INT8 rows `(..., N, K)` and their scales `(..., N)` stand for, rounded to a dtype."""
    return (weight * scale.unsqueeze(-1)).to(dtype)


class _Int8Module(nn.Module):
    """Holds INT8 weights as parameters without gradient, so that memory reports and device moves see them."""

    def _hold(self, name: str, quantized: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.register_parameter(name, nn.Parameter(quantized[0], requires_grad=False))
        self.register_parameter(f"{name}_scale", nn.Parameter(quantized[1], requires_grad=False))

    def _apply(self, fn: Callable, recurse: bool = True) -> _Int8Module:
        """Follows `.to` and the like, but scales stay in fp32: bf16 would change every weight by up to 0.2 %."""
        scales = {name: p.data for name, p in self.named_parameters(recurse=False) if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = scale.to(parameter.device)
        return self


class Int8Linear(_Int8Module):
    """A linear layer with INT8 weights.

    Args:
        weight: `(N, K)`, floating. bias: `(N,)` or None.
        int8_activations: whether many rows at once are rounded to 8 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, int8_activations: bool):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.int8_activations = int8_activations
        self._hold("weight", quantize_rows(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., K)` to `(..., N)`."""
        int8_activations = self.int8_activations and input.numel() >= FEWEST_INT8_ROWS * input.shape[-1]
        y = serve(LINEAR, self, input, self.weight, self.weight_scale, self.bias, int8_activations)
        if y is not None:
            return y
        return F.linear(input, dequantize(self.weight, self.weight_scale, input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Experts(_Int8Module):
    """Routed experts with INT8 weights, `(E, 2I, D)` and `(E, D, I)`, scales `(E, 2I)` and `(E, D)`."""

    def __init__(self, experts: DeepseekV3Experts, int8_activations: bool):
        super().__init__()
        self.config = experts.config
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.int8_activations = int8_activations
        for name in ("gate_up_proj", "down_proj"):
            # One expert after another: the fp32 copy of all of them would be four times the result
            each = [quantize_rows(weight) for weight in getattr(experts, name)]
            self._hold(name, (torch.stack([q for q, _ in each]), torch.stack([scale for _, scale in each])))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(T, D)`, `(T, K)`, `(T, K)` to `(T, D)`."""
        implementation = self.config._experts_implementation
        served = serve_experts(implementation, self, hidden_states, top_k_index, top_k_weights)
        if served is not None:
            return served
        dtype = hidden_states.dtype
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue  # of another rank
            tokens, places = torch.where(top_k_index == expert)
            gate_up, down = (
                dequantize(getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert], dtype)
                for name in ("gate_up_proj", "down_proj")
            )
            gate, up = F.linear(hidden_states[tokens], gate_up).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, down).float()
            output.index_add_(0, tokens, result * top_k_weights[tokens, places].float().unsqueeze(-1))
        return output.to(dtype)


register_plain("linear", Int8Linear)
register_plain("experts", Int8Experts)


class _InMemoryOnly(HfQuantizer):
    """Makes Transformers refuse to save or train such a model: there is no file format for it here."""

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def quantize_int8(model: PreTrainedModel, activations: str = "bf16", progress: bool = False) -> PreTrainedModel:
    """Rounds the weights of a model to INT8, in place and layer by layer, so that no second model is held.

    Linear layers and routed experts are rounded. Embeddings, norms, routers, `kv_b_proj` (folded into the queries when
    decoding) and a head tied to the embedding stay as they are.

    Args:
        model: a model of this package. It can neither be trained nor saved afterwards.
        activations: "bf16" (16-bit whole numbers inside, no loss beyond the weights') or "int8" (8 bits for many rows
            at once, as in prefill).
        progress: whether to show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: for other activations, or a model that is quantised already.
    """
    if activations not in ("bf16", "int8"):
        raise ValueError(f"activations is 'bf16' or 'int8', not {activations!r}.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantised already.")
    int8_activations = activations == "int8"
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Names only: each original is to be freed as soon as it is replaced
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, DeepseekV3Experts)
        or (isinstance(child, nn.Linear) and name != "kv_b_proj" and id(child.weight) not in embeddings)
    ]
    for parent, name in tqdm(places, desc="INT8", unit="module", disable=not progress):
        child = getattr(parent, name)
        if isinstance(child, DeepseekV3Experts):
            quantized: nn.Module = Int8Experts(child, int8_activations)
        else:
            quantized = Int8Linear(child.weight, child.bias, int8_activations)
        setattr(parent, name, quantized.train(child.training))
    model.hf_quantizer = _InMemoryOnly(QuantizationConfigMixin(quant_method="int8 weights"))
    return model
