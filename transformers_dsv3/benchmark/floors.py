"""The least that a workload has to read and to compute, and how long that takes at the machine's ceilings."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .workloads import Workload


@dataclass(frozen=True)
class Work:
    """What one unit of a workload needs at the least.

    Args:
        bytes_read: weights and latents that are read once, whatever the batch.
        linear_operations: of projections, experts, router and head; a multiplication and an addition are two.
        attention_operations: of scores and weighted sums.
        optimizer_bytes: read and written by the optimizer after everything else.
    """

    bytes_read: int = 0
    linear_operations: int = 0
    attention_operations: int = 0
    optimizer_bytes: int = 0

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Weights:
    """Where a model's parameters and buffers lie, in bytes or in elements.

    Args:
        every_token: what each token passes: attention, dense layers, shared experts, routers, norms.
        head: the output head.
        embedding_row: one token's embedding.
        expert: one routed expert of one layer.
        moe_layers: layers that have routed experts.
    """

    every_token: int
    head: int
    embedding_row: int
    expert: int
    moe_layers: int


def count_weights(model: PreTrainedModel, in_bytes: bool) -> Weights:
    """Counts the state dict of a model without its MTP layers, by the names of its tensors.

    Args:
        in_bytes: bytes of storage, scales and biases included; otherwise elements of the matrices alone.
    """
    config = model.config
    every_token = head = embedding = experts = 0
    moe_layers = set()
    for name, tensor in model.state_dict().items():
        size = tensor.nbytes
        if not in_bytes:
            size = tensor.numel() if tensor.dim() >= 2 and not name.endswith("_scale") else 0
            size *= 2 if tensor.dtype == torch.uint8 else 1  # two of 4 bits in a byte
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if re.search(r"\bmtp\.\d+\.", name):
            continue
        if ".mlp.experts." in name and layer:
            experts += size
            moe_layers.add(int(layer[1]))
        elif "embed_tokens" in name:
            embedding += size
        elif name.startswith("lm_head."):
            head += size
        else:
            every_token += size
    return Weights(
        every_token=every_token,
        head=head if head else embedding,
        embedding_row=embedding // config.vocab_size,
        expert=experts // (config.n_routed_experts * max(len(moe_layers), 1)),
        moe_layers=len(moe_layers),
    )


def work_of(model: PreTrainedModel, workload: Workload, experts_used: float) -> Work:
    """The least one unit of a workload needs with this model.

    Args:
        experts_used: distinct experts that a step of decoding reads, averaged over its layers.
    """
    config = model.config
    tokens = workload.batch * (1 if workload.decodes else workload.tokens)
    stored, matrices = count_weights(model, in_bytes=True), count_weights(model, in_bytes=False)

    chosen = config.num_experts_per_tok * matrices.expert * matrices.moe_layers
    logits = tokens if workload.what == "train" else workload.batch
    linear = 2 * (tokens * (matrices.every_token + chosen) + logits * matrices.head)
    width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    # Causal: a query sees half of a prompt on average
    pairs = workload.batch * workload.tokens * (workload.tokens + 1) // 2
    attention = 2 * config.num_hidden_layers * width * pairs

    if workload.what == "train":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The parameter and two moments are read and written, the gradient read
        optimizer = 7 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        return Work(0, 3 * linear, 3 * attention, optimizer)

    read = stored.every_token + stored.head + round(experts_used * stored.expert * stored.moe_layers)
    read += tokens * stored.embedding_row
    if not workload.decodes:
        return Work(read, linear, attention)
    latent = (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize
    read += workload.batch * workload.tokens * latent * config.num_hidden_layers
    # What decoding computes depends on how: absorbed or expanded. Memory bounds it, so only the reading counts here.
    return Work(read, linear, 0)


def floor_seconds(work: Work, bandwidth: float, linear_rate: float, attention_rate: float) -> float:
    """The shortest time for one unit: reading or computing, whichever takes longer, then the optimizer.

    Args:
        bandwidth: bytes a second.
        linear_rate, attention_rate: operations a second.
    """
    computing = work.linear_operations / linear_rate + work.attention_operations / attention_rate
    return max(work.bytes_read / bandwidth, computing) + work.optimizer_bytes / bandwidth


def expected_experts(config: Any, workload: Workload) -> float:
    """Distinct experts of a layer that a unit of work chooses, if all are equally likely and tokens independent."""
    tokens = workload.batch * (1 if workload.decodes else workload.tokens)
    missed = (1 - config.active_expert_share) ** tokens
    return config.n_routed_experts * (1 - missed)


class ExpertsUsed:
    """Counts the distinct experts that each call of a model's routers chooses, within a `with` block."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.counts: list[int] = []
        self.handles: list[Any] = []

    def __enter__(self) -> ExpertsUsed:
        for layer in self.model.model.layers:
            if hasattr(layer.mlp, "gate"):
                self.handles.append(layer.mlp.gate.register_forward_hook(self._count))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, gate: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self.counts.append(outputs[2].unique().numel())

    def mean(self) -> float:
        """Averaged over layers and calls; 0 for a model without routed experts."""
        return sum(self.counts) / len(self.counts) if self.counts else 0.0
