"""Load balancing without an auxiliary loss: the routers' correction bias moves at each optimizer step.

Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2. In training every router counts the tokens
that chose each of its experts; what was counted over all micro-batches and all ranks decides the sign of the step.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..models.dsv3.moe_dsv3 import DeepseekV3TopkRouter
from .metrics import MetricsCallback, Throughput, require_base_model
from .routing_statistics import routing_statistics


logger = logging.get_logger(__name__)

# γ of the paper, for runs that are long enough for it
LONG_RUN_RATE = 1e-3
# How far the biases of a short run are able to move in all, in units of a sigmoid score
REACH = 1.0
# In a run of a few steps no rate leads anywhere; a larger one than this only throws the choices about
LARGEST_DEFAULT_RATE = 0.05


def routers(model: nn.Module) -> list[DeepseekV3TopkRouter]:
    """The model's routers, in the order of its layers, those of MTP layers last.

    Of a router that PEFT trains whole (`modules_to_save`) the copy that is trained.
    """
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, DeepseekV3TopkRouter) and "original_module" not in name.split(".")
    ]


def _layers_of(model: nn.Module, gates: list[DeepseekV3TopkRouter]) -> tuple[list[int], int]:
    """The layer of the network that each router belongs to, MTP layers behind the others, and how many there are.

    A process of a pipeline may have some of the layers only, others than the next process.
    """
    name_of = {id(module): name for name, module in model.named_modules()}
    base = require_base_model(model, "take_loads")
    layers = []
    for gate in gates:
        kind, number = re.findall(r"\b(layers|mtp)\.(\d+)\.", name_of[id(gate)])[-1]
        layers.append(int(number) + base.config.num_hidden_layers * (kind == "mtp"))
    return layers, base.config.num_hidden_layers + base.config.num_nextn_predict_layers


def take_loads(model: nn.Module, valid: bool = True) -> tuple[torch.Tensor, bool]:
    """What the routers counted since the last time, summed over all ranks; the counters start again at zero.

    Ranks that have different layers, as in pipelines, add up those of the same place in the network.

    Ranks of one tensor-parallel group count the same tokens, all of them equally often, which changes no ratio.

    Args:
        valid: whether the step that was counted is one to go by on this rank.

    Returns:
        Tokens that chose each expert, int64 `(L, E)`, and whether the step is valid on all ranks.
    """
    gates = routers(model)
    device = gates[0].e_score_correction_bias.device
    loads_LE = torch.zeros(len(gates), gates[0].num_experts, dtype=torch.int64, device=device)
    for loads_E, gate in zip(loads_LE, gates):
        if gate.tokens_per_expert is not None:
            loads_E += gate.tokens_per_expert
            gate.tokens_per_expert.zero_()
    invalid = torch.tensor([not valid], dtype=torch.int64, device=device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        layers, number = _layers_of(model, gates)
        everywhere = loads_LE.new_zeros(number, loads_LE.shape[1])
        everywhere[layers] = loads_LE
        together = torch.cat([everywhere.flatten(), invalid])
        dist.all_reduce(together)
        loads_LE, invalid = together[:-1].view_as(everywhere)[layers], together[-1:]
    return loads_LE, not bool(invalid)


@torch.no_grad()
def move_correction_bias(model: nn.Module, loads_LE: torch.Tensor, update_rate: float) -> None:
    """Raises the correction bias of experts with less than the mean load by `update_rate`, and lowers that of others.

    The bias is brought back to a mean of zero: a constant in it changes no choice.

    Args:
        model: any model with the plugin's routers.
        loads_LE: int64, as [`take_loads`] gives them. A layer that saw no token keeps its bias, and so does a router
            that is frozen.
        update_rate: γ.
    """
    for loads_E, gate in zip(loads_LE, routers(model), strict=True):
        if not gate.weight.requires_grad:
            continue
        # In integers: E times a load beside the sum of all, so that no rounding decides a sign
        lacking_E = (loads_E.sum() - loads_E.numel() * loads_E).sign()
        bias_E = gate.e_score_correction_bias.double() + update_rate * lacking_E
        gate.e_score_correction_bias.copy_(bias_E - bias_E.mean() * lacking_E.any())


class LoadBalancingCallback(MetricsCallback):
    """Balances the experts' load while `Trainer`, or one of TRL's trainers, trains a DeepSeek-V3 model.

    ```python
    Trainer(model=model, args=args, train_dataset=data, callbacks=[LoadBalancingCallback()])
    ```

    At each optimizer step each router's correction bias moves by γ·sign(mean load - load). Steps with a gradient that
    is not finite, and those that a loss scaler skips, move nothing. The bias is part of the checkpoint, so a resumed
    run goes on exactly. Routers that are frozen (adapters) and models in the hands of preference trainers
    (`DPOTrainer`) keep their bias; their load is reported all the same.

    Logged with every training loss: `router/utilisation` (mean over maximum load), `router/max_violation` (MaxVio),
    `router/load_entropy` (1 when all are used alike), `router/dead_experts` (a sum; the others are means over layers),
    `router/bias_update_rate`, `tokens_per_second` over all ranks, and `mfu`, the share of the floating-point rate of
    large matrix products measured on this device that the model's own operations reach.

    Padding is not counted where a 2D `attention_mask` tells it; a 4D mask does not.

    Args:
        bias_update_rate: γ. By default 0.001, DeepSeek-V3's, or more in a run of fewer than about 1,100 steps, such
            that its biases are able to move by 1 in all; never more than 0.05.
        warmup_ratio: share of the run over which γ rises from 0.
        decay_ratio: share of the run, at its end, over which γ falls to 0 in a straight line; 0 is a constant γ.
        seq_aux_loss_weight: α of the sequence-wise balance loss, put into the model's config; 0.0001 in DeepSeek-V3.
            By default the config's own, which is 0.

    Raises:
        ValueError: for arguments out of range; and when training begins, for a model without the plugin's routers, or
            with a correction bias that is not fp32.
    """

    def __init__(
        self,
        bias_update_rate: float | None = None,
        warmup_ratio: float = 0.0,
        decay_ratio: float = 0.2,
        seq_aux_loss_weight: float | None = None,
    ):
        for name, value, most in (
            ("bias_update_rate", bias_update_rate, float("inf")),
            ("warmup_ratio", warmup_ratio, 1.0),
            ("decay_ratio", decay_ratio, 1.0),
            ("seq_aux_loss_weight", seq_aux_loss_weight, float("inf")),
        ):
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"`{name}={value!r}` must lie between 0 and {most}.")
        if warmup_ratio + decay_ratio > 1:
            raise ValueError(
                f"`warmup_ratio={warmup_ratio}` and `decay_ratio={decay_ratio}` are more than the whole run together."
            )
        self.bias_update_rate = bias_update_rate
        self.warmup_ratio = warmup_ratio
        self.decay_ratio = decay_ratio
        self.seq_aux_loss_weight = seq_aux_loss_weight
        self.holds_bias: str | None = None
        self.gradients_are_finite = True
        self.loads_LE: torch.Tensor | None = None
        self.throughput: Throughput | None = None

    def update_rate(self, step: int, max_steps: int) -> float:
        """γ of optimizer step `step`, counted from 0, of a run of `max_steps`."""
        rate = self.bias_update_rate
        if rate is None:
            # Of γ times its steps, a line up or down leaves half
            rate = REACH / (max_steps * (1 - (self.warmup_ratio + self.decay_ratio) / 2))
            rate = min(max(rate, LONG_RUN_RATE), LARGEST_DEFAULT_RATE)
        done = (step + 0.5) / max_steps
        if done < self.warmup_ratio:
            return rate * done / self.warmup_ratio
        if done > 1 - self.decay_ratio:
            return rate * max(1 - done, 0.0) / self.decay_ratio
        return rate

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        base = require_base_model(model, type(self).__name__)
        gates = routers(model)
        if not gates:
            raise ValueError(
                "LoadBalancingCallback is for mixture-of-experts layers, and this model has none: of its "
                f"{base.config.num_hidden_layers} layers the first `first_k_dense_replace="
                f"{base.config.first_k_dense_replace}` are dense."
            )
        for gate in gates:
            if gate.e_score_correction_bias.dtype != torch.float32:
                raise ValueError(
                    f"e_score_correction_bias is {gate.e_score_correction_bias.dtype}: balancing needs it in fp32, as "
                    "`from_pretrained` loads it."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (DataParallel) would count on copies of the routers that are "
                "thrown away: start one process for each, with `accelerate launch` or `torchrun`."
            )
        base.training_state.load_balancing_is_settled = True
        if self.seq_aux_loss_weight is not None:
            self.set_for_training(model, "seq_aux_loss_weight", self.seq_aux_loss_weight)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        self.holds_bias = None
        if not any(gate.weight.requires_grad for gate in routers(model)):
            self.holds_bias = "the routers are frozen"
        elif not require_base_model(model, type(self).__name__).training_state.trains_next_token_prediction:
            self.holds_bias = "the training is for preferences"
        if self.holds_bias:
            logger.warning_once(f"LoadBalancingCallback reports the experts' load only: {self.holds_bias}.")
        take_loads(model)  # what was counted before is not of this run
        self.loads_LE = None
        self.throughput = Throughput(model, args)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.throughput is not None:
            self.throughput.start()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.throughput is not None:
            self.throughput.start()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [gate.weight.grad for gate in routers(kwargs["model"]) if gate.weight.grad is not None]
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
        self.gradients_are_finite = all(bool(grad.isfinite().all()) for grad in local)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        loads_LE, is_valid = take_loads(model, self.gradients_are_finite and not skipped)
        if is_valid:
            self.loads_LE = loads_LE if self.loads_LE is None else self.loads_LE + loads_LE
            if not self.holds_bias:
                move_correction_bias(model, loads_LE, self.update_rate(state.global_step, state.max_steps))
        assert self.throughput is not None
        self.throughput.count(int(loads_LE[0].sum()) // routers(model)[0].top_k)

    def metrics(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        figures = {}
        if self.loads_LE is not None:
            statistics = routing_statistics(self.loads_LE.cpu()).mean()
            figures = {
                f"router/{name}": statistics[name]
                for name in ("utilisation", "max_violation", "load_entropy", "dead_experts")
            }
            self.loads_LE = None
        if not self.holds_bias:
            figures["router/bias_update_rate"] = self.update_rate(max(state.global_step - 1, 0), state.max_steps)
        assert self.throughput is not None
        return {**figures, **self.throughput.take()}
