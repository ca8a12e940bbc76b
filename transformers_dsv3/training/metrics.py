"""Figures of training that reach what `Trainer` logs to: TensorBoard, W&B, trackio, its own history."""

from __future__ import annotations

import functools
import gc
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from ..kernels.matmul_cpu import matmul
from ..models.dsv3.modeling_dsv3 import DeepseekV3Model


def base_model_of(model: nn.Module) -> DeepseekV3Model | None:
    """The decoder within a model or an adapter around one, None where it is not of this package."""
    return next((module for module in model.modules() if isinstance(module, DeepseekV3Model)), None)


def require_base_model(model: nn.Module, callback: str) -> DeepseekV3Model:
    """[`base_model_of`]; raises ValueError for other models, naming the callback that needs one."""
    base = base_model_of(model)
    if base is None:
        adapted = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper names nothing
        message = f"{callback} is for the DeepSeek-V3 models of transformers_dsv3, not for {type(adapted).__name__}."
        if getattr(getattr(model, "config", None), "model_type", None) == "deepseek_v3":
            message += " Import transformers_dsv3 before the model is loaded."
        raise ValueError(message)
    return base


class MetricsCallback(TrainerCallback):
    """A callback with figures of its own in every log entry of a training loss, and settings for the time of a run."""

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        """Refuses a model that cannot be trained so, and puts settings into its config.

        Called when the trainer is made, before the optimizer is, and again when training begins: callbacks may be
        added in between, and with `model_init` the model is another one by then.
        """
        raise NotImplementedError

    def set_for_training(self, model: nn.Module, name: str, value: float) -> None:
        """Puts a value into the config; what stood there comes back when training ends."""
        base = base_model_of(model)
        assert base is not None
        base.training_state.config_before_training.setdefault(name, getattr(base.config, name))
        setattr(base.config, name, value)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if model is None:
            return  # `model_init` has not made it yet
        if not any(cls.__module__.startswith("trl.") for cls in type(args).__mro__):
            base = base_model_of(model)
            if base is not None:  # else refused below
                base.training_state.trains_next_token_prediction = True  # whatever another trainer did before
        self.prepare(model, args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        base = base_model_of(kwargs["model"])
        assert base is not None
        for name, value in base.training_state.config_before_training.items():
            setattr(base.config, name, value)
        base.training_state.config_before_training = {}

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """The figures since they were last asked for. Called on every rank."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prepare(kwargs["model"], args)
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

    The time is that from one optimizer step to the next, waiting for data included, evaluation and saving not.

    Args:
        model: what is trained.
        args: tells the dtype that autocast multiplies in.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments):
        # Of layers on other processes of a pipeline the weights are not here
        here = (parameter for parameter in model.parameters() if not parameter.is_meta)
        parameter = next(parameter for parameter in here if parameter.is_floating_point())
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else parameter.dtype
        self.device = parameter.device
        self.operations_per_token = 6 * multiplied_parameters(model)
        self.device_rate = matmul_rate(self.device, dtype)
        self.ranks = args.world_size
        # Ranks of one tensor-parallel group are given the same tokens
        self.copies = getattr(model, "_tp_size", None) or 1
        self.seconds, self.tokens = 0.0, 0
        self.started = time.perf_counter()

    def start(self) -> None:
        """Begins a step, where something else than training came before it."""
        self.started = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Ends an optimizer step of so many tokens, counted over all ranks, and begins the next."""
        now = time.perf_counter()
        self.seconds += now - self.started
        self.tokens += tokens // self.copies
        self.started = now

    def take(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        rate = self.tokens / self.seconds
        self.seconds, self.tokens = 0.0, 0
        return {
            "tokens_per_second": round(rate),
            "mfu": rate * self.operations_per_token / (self.device_rate * self.ranks),
        }


def multiplied_parameters(model: nn.Module) -> int:
    """Parameters in the matrix products of one token: of the routed experts only the chosen share, no embedding.

    The output head counts once, and once more for each MTP layer that is trained; those that are not do not count.
    Attention's products with the context are left out.
    """
    base = base_model_of(model)
    if base is None:
        raise ValueError(f"{type(model).__name__} holds no DeepSeek-V3 model of transformers_dsv3.")
    share = base.config.active_expert_share
    trained = [layer for layer in base.mtp_layers if layer.is_trained]
    layers = [*base.layers, *trained]
    count = sum(
        int(parameter.numel() * share) if ".experts." in name else parameter.numel()
        for layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1
    )
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return count + (0 if head is None else head.weight.numel() * (1 + len(trained)))


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product on a device, the best of five.

    Measured once in a process, since it takes a second.
    """

    def seconds(size: int) -> float:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        matmul(left, right)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            result = matmul(left, right)  # on a CPU by the faster of torch's libraries
            result[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times)

    # Large products tell the rate, but where small ones are slow (fp16 on CPUs) they would take minutes
    size = 512
    fastest = seconds(size)
    if fastest < 0.02:
        size = 2048
        fastest = seconds(size)
    return 2 * size**3 / fastest
