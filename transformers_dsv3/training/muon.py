"""Muon for matrices, those of every expert by themselves, and AdamW for everything else, under `Trainer`.

Jordan et al. (kellerjordan.github.io/posts/muon), with the weight decay and the scale of Moonlight (arXiv 2502.16982):
the momentum of a matrix is orthogonalised by Newton-Schulz iterations, and an update is as large as AdamW's in the
mean, so that both take the same learning rate. `torch.optim.Muon` refuses parameters that are not 2D, so it leaves out
the experts, most of such a model; on 2D ones the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw


# Jordan's polynomial: steepest at 0, and singular values end between 0.7 and 1.2 rather than at 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Of an update's elements in the mean, as AdamW's are (Moonlight, section 2.2)
UPDATE_RMS = 0.2
# Stacks of several matrices by the end of their names: gate above up
STACKED = {"gate_up_proj": 2}
# Output heads by their names, as language models and classifiers have them
HEADS = {"lm_head", "score", "classifier"}


def orthogonalised(
    matrices: torch.Tensor,
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
) -> torch.Tensor:
    """U·Vᵀ of the singular value decomposition U·S·Vᵀ of each matrix, nearly: Newton-Schulz iterations, all at once.

    Args:
        matrices: `(..., m, n)`.
        steps: iterations.
        dtype: of the products. With bf16 singular values are up to some hundredths further off.

    Returns:
        The same shape, in `dtype`. Zeros stay zeros.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = (x / torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float32).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """One step of Muon for groups with `matrices=True`, of AdamW for the others. [`muon_groups`] makes them.

    Args:
        params: groups. Those of matrices `(m, n)` or `(E, m, n)` have `matrices`, True, and `stacked`, how many
            matrices of equally many rows each of theirs is made of.
        lr: of both.
        weight_decay: of all groups that have none of their own.
        momentum: of the matrices, in Nesterov's form.
        betas, eps: of AdamW.
        newton_schulz_steps: iterations.
        newton_schulz_dtype: what they compute in. fp32 takes several times as long where there are matrix units.

    Raises:
        ValueError: for numbers out of range, and groups of matrices with something that is none.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ):
        for name, value, most in (
            ("lr", lr, math.inf),
            ("weight_decay", weight_decay, math.inf),
            ("momentum", momentum, 1.0),
            ("betas[0]", betas[0], 1.0),
            ("betas[1]", betas[1], 1.0),
            ("eps", eps, math.inf),
        ):
            if not 0 <= value < most:
                raise ValueError(f"`{name}={value!r}` must be at least 0 and below {most}.")
        if not 1 <= newton_schulz_steps < 100:
            raise ValueError(f"`newton_schulz_steps={newton_schulz_steps!r}` must be between 1 and 99.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
            "matrices": False,
            "stacked": 1,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.dim() not in (2, 3) or parameter.shape[-2] % group["stacked"]:
                    raise ValueError(
                        f"Muon takes matrices and stacks of {group['stacked']}, not a parameter of shape "
                        f"{tuple(parameter.shape)}: put it into a group without `matrices`."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._matrix_step(parameter, group)
            else:
                self._adamw_step(group)
        return loss

    def _matrix_step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        grad, buffer, weight = (_local(tensor) for tensor in (parameter.grad, state["momentum_buffer"], parameter))
        buffer.lerp_(grad, 1 - group["momentum"])
        update, back = _whole_matrices(grad.lerp(buffer, group["momentum"]), parameter)
        if update.numel():
            parts = update.unflatten(-2, (group["stacked"], -1))
            parts = orthogonalised(parts, group["newton_schulz_steps"], group["newton_schulz_dtype"])
            scale = UPDATE_RMS * math.sqrt(max(parts.shape[-2:]))
            update = parts.flatten(-3, -2).to(weight.dtype)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(back(update), alpha=-group["lr"] * scale)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in moved:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        moved = [parameter for parameter in moved if _local(parameter).numel()]
        if not moved:
            return
        states = [self.state[parameter] for parameter in moved]
        adamw(
            [_local(parameter) for parameter in moved],
            [_local(parameter.grad) for parameter in moved],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=all(parameter.device.type in ("cpu", "cuda") for parameter in moved),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    """What this process has of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole_matrices(
    local: torch.Tensor, parameter: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Whole matrices of which this process has a part, and a function that takes that part out again.

    Experts that are shared out whole, by FSDP2 or expert parallelism, stay where they are; other matrices are
    gathered, and every process orthogonalises all of them.
    """
    if not isinstance(parameter, DTensor):
        return local, lambda update: update
    mesh, placements = parameter.device_mesh, parameter.placements
    kept_whole = parameter.dim() == 3
    if all(placement.is_replicate() or (kept_whole and placement.is_shard(0)) for placement in placements):
        return local, lambda update: update
    gathered = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()
    everywhere = [Replicate()] * mesh.ndim

    def part(update: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(update, mesh, everywhere, run_check=False).redistribute(mesh, placements).to_local()

    return gathered, part


def muon_groups(model: nn.Module, weight_decay: float = 0.1, experts: bool = True) -> list[dict[str, Any]]:
    """A model's trainable parameters in groups for [`Muon`]: matrices, stacks of two, and what AdamW moves.

    Matrices are all weights of layers, routers' among them, and experts'; embedding and output head are AdamW's, as
    are norms and biases, which do not decay.

    Args:
        weight_decay: of what decays.
        experts: whether experts' matrices are Muon's too, and not AdamW's.

    Raises:
        ValueError: nothing is trainable.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = not HEADS.isdisjoint(name.split("."))
            is_matrix = (
                parameter.dim() in ((2, 3) if experts else (2,)) and id(parameter) not in tables and not is_head
            )
            stacked = STACKED.get(name.rpartition(".")[2], 1) if is_matrix else 1
            kinds.setdefault((is_matrix, stacked, parameter.dim() > 1), []).append(parameter)
    if not kinds:
        raise ValueError("The model has no parameter that is trainable.")
    return [
        {
            "params": parameters,
            "matrices": is_matrix,
            "stacked": stacked,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_matrix, stacked, decays), parameters in kinds.items()
    ]


class _Factory:
    """What `Trainer` calls with the model that it is to optimise."""

    def __call__(self, model: nn.Module, weight_decay: float, experts: bool, **options: Any) -> Muon:
        return Muon(muon_groups(model, weight_decay, experts), weight_decay=weight_decay, **options)


def muon(
    lr: float, weight_decay: float = 0.1, experts: bool = True, **options: Any
) -> tuple[type[_Factory], dict[str, Any]]:
    """[`Muon`] over a model's matrices and AdamW over the rest, for `Trainer`.

    ```python
    Trainer(model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=muon(lr=2e-3))
    ```

    The trainer's schedule multiplies both learning rates; `learning_rate`, `weight_decay` and Adam's fields of
    `TrainingArguments` are not looked at. With FSDP2 and expert parallelism experts are orthogonalised where they are.

    Args:
        lr: learning rate of matrices and of the rest: what AdamW would have, or more.
        weight_decay: of all but norms and biases.
        experts: whether experts' matrices are Muon's too, and not AdamW's.
        options: other arguments of [`Muon`].

    Returns:
        What `optimizer_cls_and_kwargs` is to be.

    Raises:
        ValueError: for numbers out of range.
    """
    arguments = {"lr": lr, "weight_decay": weight_decay, **options}
    Muon([{"params": [nn.Parameter(torch.zeros(1))]}], **arguments)  # refuses here what it would refuse in training
    return _Factory, {**arguments, "experts": experts}
