"""Pruning of routed experts: how much each does to a text, and models without the least of them.

What is left is an official model with fewer experts a layer: their weights are gathered, so are the rows of the
routers, and the correction bias is brought back to a mean of zero, which changes no choice. MTP layers lose as many.

Shape suffixes: T tokens, K experts chosen a token, E routed experts, D hidden size, L mixture-of-experts layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..models.dsv3.modeling_dsv3 import DeepseekV3Model
from ..models.dsv3.moe_dsv3 import DeepseekV3Experts, DeepseekV3MoE, DeepseekV3TopkRouter
from ..models.dsv3.mtp_dsv3 import shift_left
from ..training.metrics import base_model_of
from .expert_choice import ExpertImportance, choose_experts


class LayerImportance:
    """Gathers one layer's importance, some tokens at a time.

    Attributes:
        activation: fp64 `(E,)`, sum of mixing weight times norm of the output over the tokens that chose an expert.
        tokens_per_expert: fp64 `(E,)`. tokens: how many there were.
    """

    def __init__(self, n_experts: int):
        self.activation = torch.zeros(n_experts, dtype=torch.float64)
        self.tokens_per_expert = torch.zeros(n_experts, dtype=torch.float64)
        self.tokens = 0

    def add(self, weights_TK: torch.Tensor, indices_TK: torch.Tensor, norms_TK: torch.Tensor) -> None:
        """
        Args:
            weights_TK, indices_TK: as the router gives them.
            norms_TK: of the chosen experts' outputs, as `output_norms` gives them.
        """
        indices = indices_TK.flatten().cpu()
        products = (weights_TK.double() * norms_TK.double()).flatten().cpu()
        self.activation.index_add_(0, indices, products)
        self.tokens_per_expert += torch.bincount(indices, minlength=len(self.activation))
        self.tokens += indices_TK.shape[0]

    @property
    def reap(self) -> torch.Tensor:
        """Mean over the tokens that chose an expert, 0 where none did."""
        return self.activation / self.tokens_per_expert.clamp(min=1)


@torch.no_grad()
def output_norms(experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Euclidean norms `(T, K)` of what each chosen expert makes of its tokens, before mixing weights, fp32.

    Args:
        experts: `DeepseekV3Experts`.
    """
    norms_TK = torch.empty(indices_TK.shape, device=hidden_TD.device)
    for expert in indices_TK.unique().tolist():
        tokens, places = torch.where(indices_TK == expert)
        gate, up = F.linear(hidden_TD[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        output = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        norms_TK[tokens, places] = output.float().norm(dim=-1)
    return norms_TK


@torch.no_grad()
def expert_importance(
    model: nn.Module, stream: torch.Tensor, *, window: int, batch_size: int = 4, progress: bool = False
) -> ExpertImportance:
    """Runs a model over a text and gathers how much each routed expert does to it, those of MTP layers too.

    Args:
        model: a model of this package, in any floating dtype. It is in evaluation mode meanwhile.
        stream: the text's token ids, int64 `(n_tokens,)`, cut into windows that do not overlap.
        window: tokens of a window. batch_size: windows that run together.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a model without routed experts, with adapters or with quantised weights, or a text of fewer
            tokens than two.
    """
    base, mixtures = _mixtures(model)
    if window < 2 or stream.dim() != 1 or stream.numel() < 2:
        raise ValueError(f"`stream` {tuple(stream.shape)} must be a row of two tokens or more, as `window={window}`.")
    gathered = {layer: LayerImportance(base.config.n_routed_experts) for layer in mixtures}
    counted: list[torch.Tensor | None] = [None]  # which of the tokens that run are of the text

    def gathering(layer: int, experts: DeepseekV3Experts) -> Callable[..., None]:
        def add(gate: nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            hidden_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
            _, weights_TK, indices_TK = output
            if counted[0] is not None:
                hidden_TD, weights_TK, indices_TK = (x[counted[0]] for x in (hidden_TD, weights_TK, indices_TK))
            gathered[layer].add(weights_TK, indices_TK, output_norms(experts, hidden_TD, indices_TK))

        return add

    whole = stream[: stream.numel() // window * window].view(-1, window)
    rest = stream[whole.numel() :][None]
    batches = [*whole.split(batch_size), *([rest] if rest.numel() > 1 else [])]
    was_training = base.training
    base.eval()
    handles = [
        mixture.gate.register_forward_hook(gathering(layer, mixture.experts)) for layer, mixture in mixtures.items()
    ]
    try:
        for ids_BS in tqdm(batches, desc="experts", unit="batch", disable=not progress):
            _run(base, ids_BS.to(base.device), counted)
    finally:
        for handle in handles:
            handle.remove()
        base.train(was_training)
    return ExpertImportance(
        layers=tuple(gathered),
        reap=torch.stack([layer.reap for layer in gathered.values()]),
        frequency=torch.stack([layer.tokens_per_expert / max(layer.tokens, 1) for layer in gathered.values()]),
        tokens=sum(ids_BS.numel() for ids_BS in batches),
    )


def _run(base: DeepseekV3Model, ids_BS: torch.Tensor, counted: list[torch.Tensor | None]) -> None:
    """The decoder and its MTP layers, each fed the true tokens, over a batch without padding."""
    counted[0] = None
    hidden_BSD = base(input_ids=ids_BS, use_cache=False).last_hidden_state
    if not base.mtp_layers:
        return
    embeds_BSD = base.embed_tokens(ids_BS)
    positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
    layer_inputs = base.attention_inputs(embeds_BSD, None, positions, None)
    for depth, layer in enumerate(base.mtp_layers):
        # Behind the last token there is none to be fed
        fed_BS = (positions < ids_BS.shape[1] - depth - 1).expand_as(ids_BS)
        if fed_BS.any():
            counted[0] = fed_BS.flatten()
            hidden_BSD = layer(hidden_BSD, shift_left(embeds_BSD, depth + 1, 0.0), **layer_inputs)


def _mixtures(model: nn.Module) -> tuple[DeepseekV3Model, dict[int, DeepseekV3MoE]]:
    """The decoder within a model, and its mixture-of-experts layers by their numbers, MTP layers behind the others."""
    base = base_model_of(model)
    layers = [] if base is None else [*base.layers, *base.mtp_layers]
    mixtures = {number: layer.mlp for number, layer in enumerate(layers) if isinstance(layer.mlp, DeepseekV3MoE)}
    if base is None or not mixtures:
        raise ValueError(f"This {type(model).__name__} has no routed experts of transformers_dsv3 to prune.")
    for number, mixture in mixtures.items():
        if type(mixture.experts) is not DeepseekV3Experts or not isinstance(mixture.gate, DeepseekV3TopkRouter):
            raise ValueError(
                f"Layer {number} has {type(mixture.experts).__name__}: prune a model before it is quantised or "
                "adapted (`merge_and_unload()` gives a plain one)."
            )
    return base, mixtures


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    share: float,
    importance: ExpertImportance | None = None,
    by: str = "reap",
    seed: int = 0,
) -> dict[int, tuple[int, ...]]:
    """Removes a share of the routed experts of every layer of a model, in place.

    The model is one of fewer experts afterwards: it trains, saves and loads as such. Optimizers have to be made anew.

    Args:
        model: a model of this package, neither quantised nor adapted.
        share: of the experts to remove, the same in every layer and group.
        importance: of the experts, from `expert_importance`; not needed with `by="random"`.
        by: "reap", "frequency" or "random". seed: of the last.

    Returns:
        From a layer's number to the experts that are left of it.

    Raises:
        OptionError: for a share that cannot be removed, see `kept_experts`, and another criterion.
        ValueError: for a model or an importance that does not fit. Nothing is changed then.
    """
    base, mixtures = _mixtures(model)
    kept = choose_experts(base.config, share, importance, by, seed)
    for layer, mixture in mixtures.items():
        gate, experts, left = mixture.gate, mixture.experts, torch.tensor(kept[layer], device=base.device)
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(experts, name)
            setattr(experts, name, nn.Parameter(whole.index_select(0, left), requires_grad=whole.requires_grad))
        gate.weight = nn.Parameter(gate.weight.index_select(0, left), requires_grad=gate.weight.requires_grad)
        gate.e_score_correction_bias = recentred(gate.e_score_correction_bias, left)
        gate.tokens_per_expert = None
        experts.num_experts = gate.num_experts = len(left)
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "n_routed_experts"):
            config.n_routed_experts = len(left)  # type: ignore[union-attr]
    return kept


def recentred(bias_E: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The correction bias of the experts that are left, with a mean of zero."""
    gathered = bias_E.index_select(0, left).double()
    return (gathered - gathered.mean()).to(bias_E.dtype)
