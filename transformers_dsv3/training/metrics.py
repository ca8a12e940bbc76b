"""Figures of training that reach what `Trainer` logs to: TensorBoard, W&B, trackio, its own history."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from ..kernels.matmul_cpu import matmul
from ..models.dsv3.modeling_dsv3 import Dsv3Model


def base_model_of(model: nn.Module) -> Dsv3Model | None:
    """The decoder within a model or an adapter around one, None where it is not of this package."""
    return next((module for module in model.modules() if isinstance(module, Dsv3Model)), None)


class MetricsCallback(TrainerCallback):
    """A callback with figures of its own in every log entry of a training loss."""

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """The figures since they were last asked for. Called on every rank."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `Trainer` puts the callbacks it reports with before those it is given, and they would log without the
        # figures. It tells callbacks nothing of each other, so the list they are in is looked up.
        for callbacks in gc.get_referrers(self):
            if isinstance(callbacks, list) and any(isinstance(entry, DefaultFlowCallback) for entry in callbacks):
                callbacks.remove(self)
                callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        figures = self.metrics(state, kwargs["model"])
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


class Throughput:
    """Tokens a second, and the share of the device's floating-point rate, over the optimizer steps between two logs.

    Evaluation and saving are not in the time.

    Args:
        model: what is trained.
        args: tells the dtype that autocast multiplies in.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments):
        parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else parameter.dtype
        self.device = parameter.device
        self.operations_per_token = 6 * multiplied_parameters(model)
        self.device_rate = matmul_rate(self.device, dtype)
        self.ranks = args.world_size
        # Ranks of one tensor-parallel group are given the same tokens
        self.copies = getattr(model, "_tp_size", None) or 1
        self.started: float | None = None
        self.seconds, self.tokens = 0.0, 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        """Ends an optimizer step of so many tokens, counted over all ranks."""
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.tokens += tokens // self.copies
            self.started = None

    def take(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        rate = self.tokens / self.seconds
        self.seconds, self.tokens = 0.0, 0
        return {"tokens_per_second": rate, "mfu": rate * self.operations_per_token / (self.device_rate * self.ranks)}


def multiplied_parameters(model: nn.Module) -> int:
    """Parameters in the matrix products of one token: of the routed experts only the chosen share, no embedding.

    The output head counts once, and once more for each MTP layer that is trained; those that are not do not count.
    Attention's products with the context are left out.
    """
    base = base_model_of(model)
    if base is None:
        raise ValueError(f"{type(model).__name__} holds no DeepSeek-V3 model of transformers_dsv3.")
    share = base.config.num_experts_per_tok / base.config.n_routed_experts
    trained = [layer for layer in base.mtp_layers if layer.eh_proj.weight.requires_grad]
    layers = [*base.layers[: base.config.num_hidden_layers], *trained]
    count = sum(
        int(parameter.numel() * share) if ".experts." in name else parameter.numel()
        for layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1
    )
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return count + (0 if head is None else head.weight.numel() * (1 + len(trained)))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of a square matrix product on a device, the best of five."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        started = time.perf_counter()
        result = matmul(left, right)  # on a CPU by the faster of torch's libraries
        result[0, 0].item()  # waits for the device
        return time.perf_counter() - started

    seconds()
    return 2 * size**3 / min(seconds() for _ in range(5))
