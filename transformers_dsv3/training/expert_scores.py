"""Which routed experts a text needs: scores of all experts, and the few that are selected by them.

Wang et al., arXiv 2407.01906, section 3.2. `esft.py` trains what is selected.

Shape suffixes: B rows of a batch, S their tokens, T = B·S, K experts chosen a token, L mixture-of-experts layers,
E routed experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_json
from ..models.dsv3.modeling_dsv3 import DeepseekV3Model
from ..models.dsv3.moe_dsv3 import DeepseekV3MoE
from .metrics import base_model_of


SELECTION_FILE = "esft_selection.json"
# The paper's thresholds, by score
DEFAULT_P = {"gate": 0.1, "token": 0.2}
# Sums of shares that are equal on paper differ by less
ROUNDING = 1e-9


@dataclass(frozen=True)
class ExpertScores:
    """How much each routed expert has to do with a text (section 3.2); every row sums to 1.

    Attributes:
        layers: numbers of the L layers in the network and the checkpoint, dense layers counted.
        gate: average gate score g, fp64 `(L, E)`. The paper's p is a share of the total relevance, so g is divided by
            its sum over the layer: DeepSeek-V3's gates sum to `routed_scaling_factor`, not to 1.
        token: token selection ratio r, fp64 `(L, E)`.
        tokens: how many were scored, padding left out.
    """

    layers: tuple[int, ...]
    gate: torch.Tensor
    token: torch.Tensor
    tokens: int

    def select(self, by: str = "token", p: float | None = None) -> ExpertSelection:
        """The smallest set of experts of each layer whose scores sum to `p` or more, the best first.

        Args:
            by: `"gate"` or `"token"`.
            p: in (0, 1]. By default the paper's, 0.1 for `"gate"` and 0.2 for `"token"`.

        Raises:
            ValueError: for another score, or a `p` out of range.
        """
        if by not in DEFAULT_P:
            raise ValueError(f"`by={by!r}` must be one of {', '.join(map(repr, DEFAULT_P))}.")
        p = DEFAULT_P[by] if p is None else p
        if not 0 < p <= 1:
            raise ValueError(f"`p={p!r}` must lie in (0, 1]: it is a share of the scores of a layer.")
        scores_LE = self.gate if by == "gate" else self.token
        experts = {}
        for layer, scores_E in zip(self.layers, scores_LE, strict=True):
            order_E = scores_E.argsort(descending=True, stable=True)
            reached_E = scores_E[order_E].cumsum(0) >= p - ROUNDING
            experts[layer] = tuple(order_E[: int(reached_E.int().argmax()) + 1].tolist())
        return ExpertSelection(experts, n_experts=scores_LE.shape[1], score=by, p=p)


@dataclass(frozen=True)
class ExpertSelection:
    """The experts to train.

    Attributes:
        experts: from a layer's number to its selected experts.
        n_experts: routed experts of a layer, E.
        score, p: what they were selected by.

    Raises:
        ValueError: a layer with no expert, with one twice, or with one that there is not.
    """

    experts: dict[int, tuple[int, ...]]
    n_experts: int
    score: str
    p: float

    def __post_init__(self) -> None:
        for layer, experts in self.experts.items():
            wrong = [expert for expert in experts if not 0 <= expert < self.n_experts]
            if wrong or not experts or len(set(experts)) < len(experts):
                raise ValueError(
                    f"Layer {layer} of the selection has experts {list(experts)}: they must be one or more, all "
                    f"different, from 0 to {self.n_experts - 1}."
                )

    def at_random(self, seed: int) -> ExpertSelection:
        """As many experts of each layer, drawn from `seed`: what a selection by scores has to be better than."""
        generator = torch.Generator().manual_seed(seed)
        experts = {
            layer: tuple(torch.randperm(self.n_experts, generator=generator)[: len(chosen)].tolist())
            for layer, chosen in self.experts.items()
        }
        return ExpertSelection(experts, self.n_experts, "random", self.p)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The first three keys are those of DeepSeek's own expert configurations."""
        return {
            "experts": {str(layer): list(experts) for layer, experts in self.experts.items()},
            "shared_experts": False,
            "non_expert_modules": False,
            "n_experts": self.n_experts,
            "score": self.score,
            "p": self.p,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `esft_selection.json` into a folder, such as a checkpoint's, and return its path."""
        path = Path(folder) / SELECTION_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | Path) -> ExpertSelection:
        """Read what `save` wrote, from its folder or the file itself.

        Raises:
            OSError: there is none.
            ValueError: it is damaged, or selects more than routed experts.
        """
        path = Path(path)
        path = path / SELECTION_FILE if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            experts = {int(layer): tuple(map(int, chosen)) for layer, chosen in values["experts"].items()}
            selection = cls(experts, int(values["n_experts"]), str(values["score"]), float(values["p"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no selection of experts: {type(error).__name__} {error}") from error
        if values.get("shared_experts") or values.get("non_expert_modules"):
            raise ValueError(
                f"{path} asks for shared experts or other modules to be trained too: only routed ones can."
            )
        return selection


def score_experts(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> ExpertScores:
    """Run a model over a domain's text and score the routed experts by what the routers choose.

    For each row the mean over its tokens, then the mean over rows (the paper's samples), so that short rows weigh as
    much as long ones. The model is in evaluation mode meanwhile. Its MTP layers are not scored.

    Args:
        model: any model with a `DeepseekV3Model` in it.
        batches: `input_ids` `(B, S)` or `(S,)`, and `attention_mask` of the same shape, 0 for padding, where there is
            any: a `DataLoader`, a list of what a tokenizer returns, or a data set of tokenized rows. The paper takes
            32 rows of 4,096 tokens.

    Raises:
        ValueError: for a model without the plugin's mixture-of-experts layers, or no tokens.
    """
    base, layers = mixture_layers(model)
    sums = {name: torch.zeros(len(layers), base.config.n_routed_experts, dtype=torch.float64) for name in DEFAULT_P}
    real_BS = torch.empty(0)
    tokens = 0

    def scoring(place: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            weights_TK, indices_TK = (value.cpu()[real_BS.flatten()] for value in output[1:])
            # What a choice counts in the mean over its row's tokens
            share_T1 = (1 / real_BS.sum(dim=1).double())[real_BS.nonzero()[:, :1]]
            for name, values_TK in (
                ("gate", weights_TK.double() * share_T1),
                ("token", (share_T1 / indices_TK.shape[1]).expand(indices_TK.shape)),
            ):
                sums[name][place].index_add_(0, indices_TK.flatten(), values_TK.flatten())

        return add

    was_training = base.training
    base.eval()
    handles = [mixture.gate.register_forward_hook(scoring(i)) for i, mixture in enumerate(layers.values())]
    try:
        with torch.no_grad():
            for batch in batches:
                ids_BS, real_BS = _rows(batch)
                if ids_BS.numel():
                    mask = None if real_BS.all() else real_BS.long().to(base.device)
                    base(input_ids=ids_BS.to(base.device), attention_mask=mask, use_cache=False)
                    tokens += int(real_BS.sum())
    finally:
        for handle in handles:
            handle.remove()
        base.train(was_training)
    if not tokens:
        raise ValueError("There is no token to score experts by: the text is empty, or all of it is padding.")
    shares = {name: sums_LE / sums_LE.sum(dim=1, keepdim=True) for name, sums_LE in sums.items()}
    return ExpertScores(tuple(layers), shares["gate"], shares["token"], tokens)


def _rows(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(B, S)`, and on the CPU which of them are no padding; rows that are nothing else are left out."""
    ids_BS = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
    if batch.get("attention_mask") is None:
        return ids_BS, torch.ones(ids_BS.shape, dtype=torch.bool)
    real_BS = torch.atleast_2d(torch.as_tensor(batch["attention_mask"])).bool().cpu()
    if real_BS.shape != ids_BS.shape:
        raise ValueError(
            f"`attention_mask` {tuple(real_BS.shape)} is not of the shape of `input_ids`, {tuple(ids_BS.shape)}."
        )
    kept_B = real_BS.any(dim=1)
    return ids_BS[kept_B.to(ids_BS.device)], real_BS[kept_B]


def mixture_layers(model: nn.Module) -> tuple[DeepseekV3Model, dict[int, DeepseekV3MoE]]:
    """The decoder within a model, and its mixture-of-experts layers by their numbers, those of MTP layers left out.

    Raises:
        ValueError: there is none, or PEFT has put adapters in.
    """
    base = base_model_of(model)
    layers = {} if base is None else dict(enumerate(base.layers))
    mixtures = {number: layer.mlp for number, layer in layers.items() if isinstance(layer.mlp, DeepseekV3MoE)}
    if base is None or not mixtures:
        raise ValueError(
            "Expert-specialised fine-tuning is for DeepSeek-V3 models of transformers_dsv3 with mixture-of-experts "
            f"layers, and this {type(model).__name__} has none. Import transformers_dsv3 before the model is loaded."
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model is wrapped by PEFT. Adapters and expert-specialised fine-tuning exclude each other: give the "
            "plain model, or what `merge_and_unload()` returns."
        )
    return base, mixtures
