"""Weights of 8 or 4 bits in groups of 32 along the input, and layers that compute with them.

A group is whole numbers q times a scale s: |q| <= 127, or -8 <= q <= 7, which are the values of GGUF's Q8_0 and Q4_0.
Two whole numbers of 4 bits share a byte: byte b < 16 of a group holds elements b, in the lower half, and b + 16, each
plus 8.

Scales are stored in fp16, rounded to what bf16 holds too. From 2^-14 on that is all of bf16 up to 65,280. Smaller ones
are multiples of 2^-24: what a group of smallest weights loses is at most 127 * 2^-25 (4e-6) a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..kernels.backends import ADAPTED, LINEAR
from ..kernels.cpu.operators import GROUP
from ..kernels.dispatch import serve
from ..kernels.experts_auto import serve_experts
from ..kernels.experts_lora import LowRank, eager_experts
from ..kernels.quantized_groups import dequantize, packed_linear
from ..kernels.selection import register_plain
from ..models.dsv3.moe_dsv3 import DeepseekV3Experts


# Which activations are rounded to 8 bits where they meet quantised weights, by the choice of a user
ROUNDED_DTYPES = {None: (torch.bfloat16,), "8": (torch.bfloat16, torch.float32), "16": ()}


def quantize_groups(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weights to the nearest whole numbers of their group's scale.

    The scale of 8 bits makes the largest of a group 127, that of 4 bits makes it -8, with the sign that takes.

    Args:
        weight: `(..., N, K)`, any floating dtype, K a multiple of 32.
        bits: 8 or 4.

    Returns:
        int8 `(..., N, K)` or uint8 `(..., N, K / 2)`, and fp16 scales `(..., N, K / 32)`.

    Raises:
        ValueError: for weights that are not finite, or so large that fp16 does not hold their scale.
    """
    groups = weight.detach().float().unflatten(-1, (-1, GROUP))
    if bits == 8:
        exact_scale = groups.abs().amax(dim=-1) / 127
    else:
        exact_scale = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1) / -8
    scale = exact_scale.bfloat16().half()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"the largest weight is {groups.abs().max().item():g}, which {bits} bits do not hold")
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float()).unsqueeze(-1)
    if bits == 8:
        scaled = groups * inverse
        # Halves away from zero, as GGUF's are
        whole = scaled.abs().add_(0.5).floor_().clamp_(max=127).copysign_(scaled)
        return whole.to(torch.int8).flatten(-2), scale
    nibbles = (groups * inverse).add_(8.5).floor_().clamp_(0, 15).to(torch.uint8)
    return _join(nibbles), scale


def _join(nibbles: torch.Tensor) -> torch.Tensor:
    first, second = nibbles.chunk(2, dim=-1)
    return (first | second << 4).flatten(-2)


def empty_groups(shape: torch.Size, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of weights `(..., N, K)` on the meta device."""
    *rows, columns = shape
    values = torch.empty(*rows, columns * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device="meta")
    return values, torch.empty(*rows, columns // GROUP, dtype=torch.float16, device="meta")


def held_in(whole: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers int8 `(..., N, K)` as layers of 8 or 4 bits hold them: int8, or uint8 `(..., N, K / 2)`.

    `whole_numbers` reverses it.
    """
    return whole if bits == 8 else _join((whole + 8).view(torch.uint8).unflatten(-1, (-1, GROUP)))


class _Quantized(nn.Module):
    """Holds whole numbers as parameters without gradient, which memory reports and device moves see.

    Scales are buffers: the first floating parameter of a model is what Transformers takes for its dtype.

    Attributes:
        bits: of one weight in memory, 8 or 4.
        stored_bits: of one weight in a checkpoint: as many, or fewer where the checkpoint that it was loaded from has
            them so.
    """

    bits: int
    stored_bits: int

    def _hold(self, name: str, values: torch.Tensor, scale: torch.Tensor) -> None:
        shared = values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=False)
        self.register_parameter(name, shared)
        self.register_buffer(f"{name}_scale", scale)

    def _apply(self, fn: Callable, recurse: bool = True) -> _Quantized:
        """Follows `.to` and the like, but scales stay in fp16: bf16 need not hold those of other programs' files."""
        scales = {name: scale for name, scale in self._buffers.items() if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = self._buffers[name]
            if scale is not None and moved is not None and moved.dtype != scale.dtype:
                self._buffers[name] = scale.to(moved.device)
        return self

    def _of(self, name: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, name)[index], getattr(self, f"{name}_scale")[index]


class QuantizedLinear(_Quantized):
    """A linear layer with quantised weights.

    Args:
        values, scale: of the weight `(N, K)`, as `quantize_groups` returns them.
        bias: `(N,)` or None.
        activations: None, "8" or "16", see `quantize`.
    """

    def __init__(
        self, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: str | None = None
    ):
        super().__init__()
        self.out_features, self.in_features = scale.shape[0], scale.shape[1] * GROUP
        self.bits = self.stored_bits = 4 if values.dtype == torch.uint8 else 8
        self.rounded_dtypes = ROUNDED_DTYPES[activations]
        self._hold("weight", values, scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def lora_class(self) -> type:
        """PEFT's layer for a LoRA adapter over this one."""
        from .packed.lora import QuantizedLora

        return QuantizedLora

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., K)` to `(..., N)`."""
        rounded = input.dtype in self.rounded_dtypes
        y = serve(LINEAR, self, input, self.weight, self.weight_scale, self.bias, rounded)
        if y is not None:
            return y
        return packed_linear(input, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
        return f"{sizes}, bias={self.bias is not None}"


class QuantizedEmbedding(_Quantized):
    """An embedding with quantised weights, which gives rows of the dtype that it was made from or moved to.

    Args:
        values, scale: of the weight `(vocabulary, D)`, as `quantize_groups` returns them.
        embedding: what it replaces.
    """

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, embedding: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.bits = self.stored_bits = 4 if values.dtype == torch.uint8 else 8
        self._hold("weight", values, scale)
        like = torch.empty(0, dtype=embedding.weight.dtype, device=values.device)
        self.register_buffer("_like", like, persistent=False)

    @property
    def row_dtype(self) -> torch.dtype:
        """Of what it gives."""
        return self._like.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids `(...)` to `(..., D)`."""
        return dequantize(self.weight[input], self.weight_scale[input], self.row_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


class QuantizedExperts(_Quantized):
    """Routed experts with quantised weights: of `gate_up_proj` `(E, 2I, D)` and `down_proj` `(E, D, I)`.

    Args:
        experts: what it replaces.
        bits: 8 or 4. activations: None, "8" or "16", see `quantize`.

    Raises:
        ValueError: as `quantize_groups` does.
    """

    def __init__(self, experts: DeepseekV3Experts, bits: int, activations: str | None = None):
        super().__init__()
        self.config = experts.config
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.bits, self.rounded_dtypes = bits, ROUNDED_DTYPES[activations]
        self.stored_bits = bits
        # What adapters add to the weights while their wrappers call, by the weight's name
        self.added: dict[str, LowRank] = {}
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(experts, name)
            if weights.is_meta:  # a checkpoint has the values
                values, scale = empty_groups(weights.shape, bits)
            else:
                # One expert after another: the fp32 copy of all of them would be four times the result and more
                each = [quantize_groups(weight, bits) for weight in weights]
                values, scale = (torch.stack(parts) for parts in zip(*each))
            self._hold(name, values, scale)

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """Experts, outputs and inputs of one of the two stacks of weights."""
        n_experts, rows, groups = getattr(self, f"{name}_scale").shape
        return n_experts, rows, groups * GROUP

    @property
    def lora_class(self) -> type:
        """PEFT's layer for a LoRA adapter over one of the two stacks."""
        from .packed.lora import ParamWrapper

        return ParamWrapper

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(T, D)`, `(T, K)`, `(T, K)` to `(T, D)`."""
        call = (hidden_states, self, top_k_index, top_k_weights)
        adapters = (self.added.get("gate_up_proj"), self.added.get("down_proj"))
        if not self.added:
            implementation = self.config._experts_implementation
            served = serve_experts(implementation, self, hidden_states, top_k_index, top_k_weights)
            if served is not None:
                return served
        served = serve(ADAPTED, self, *call, *adapters)
        return eager_experts(*call, *adapters) if served is None else served

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, bits={self.bits}"


register_plain("linear", QuantizedLinear)
register_plain("embedding", QuantizedEmbedding)
register_plain("experts", QuantizedExperts)
