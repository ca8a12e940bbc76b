"""Where a model's routers send the tokens of a held-out text, and how well its MTP layers foresee it.

Shape suffixes: B windows of a batch, S tokens of a window, T = B·S, L mixture-of-experts layers, E routed experts,
K experts chosen a token, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from ..models.dsv3.moe_dsv3 import DeepseekV3TopkRouter
from ..models.dsv3.mtp_dsv3 import mtp_labels, shift_left
from ..training.routing_statistics import RoutingStatistics, routing_statistics


# Logits of so many tokens are held at a time: 0.5 GB in fp32 with DeepSeek-V3's 129,280 entries
HEAD_TOKENS = 1024
BUSIEST = 8


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one mixture-of-experts layer; its figures are those of `RoutingStatistics`.

    Attributes:
        layer: its number in the network and the checkpoint, dense layers counted.
        tokens_per_expert: how many tokens chose each of the E experts.
        mean_gate_weight: mean mixing weight of each expert over the tokens that chose it, `routed_scaling_factor`
            included; None where none did.
        busiest_experts: up to 8 experts, the most loaded first.
    """

    layer: int
    tokens_per_expert: tuple[int, ...]
    mean_gate_weight: tuple[float | None, ...]
    busiest_experts: tuple[int, ...]
    utilisation: float
    max_violation: float
    load_entropy: float
    dead_experts: int
    above_half_fair: float

    @property
    def relative_load(self) -> tuple[float, ...]:
        """Load over mean load of each expert: 1 everywhere when all are used alike."""
        mean = sum(self.tokens_per_expert) / len(self.tokens_per_expert)
        return tuple(tokens / mean for tokens in self.tokens_per_expert)


@dataclass(frozen=True)
class MtpQuality:
    """What the MTP layers foresee of the text, each fed the true tokens; one entry a layer, by depth.

    Attributes:
        agreement: share of the positions at which a layer's best token is the one that the main model finds best when
            it gets there, given the true tokens up to there. The first entry is the acceptance rate of the second
            token (arXiv 2412.19437, section 5.4.3).
        loss: cross-entropy with the true tokens, nats a token.
    """

    agreement: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def second_token_acceptance(self) -> float:
        return self.agreement[0]

    @property
    def mean_loss(self) -> float:
        """Mean over the layers, as in training before the weight λ (equation 25)."""
        return sum(self.loss) / len(self.loss)


@dataclass(frozen=True)
class RoutingReport:
    """Loads of the main model's mixture-of-experts layers on a text. MTP layers' routers are not counted: outside
    training and drafting they do not run.

    Attributes:
        n_experts, experts_per_token: E and K.
        tokens: how many went through the model, each once.
        window: tokens of context of a window, at most.
        loss: of the main model, nats a token.
        layers: one entry a mixture-of-experts layer, from the first.
        mtp: None without MTP layers, or where windows are too short for any of their targets.
    """

    n_experts: int
    experts_per_token: int
    tokens: int
    window: int
    loss: float
    layers: tuple[LayerRouting, ...]
    mtp: MtpQuality | None

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """int64 `(L, E)`."""
        return torch.tensor([layer.tokens_per_expert for layer in self.layers])

    @property
    def statistics(self) -> RoutingStatistics:
        return routing_statistics(self.tokens_per_expert)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the figures averaged over layers (`dead_experts` summed) under `mean`."""
        return {**asdict(self), "mean": self.statistics.mean()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoutingReport:
        """The report that `to_dict` was called on, from JSON too."""
        fields = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        layers = tuple(LayerRouting(**_tuples(layer)) for layer in fields.pop("layers"))
        mtp = fields.pop("mtp")
        return cls(**fields, layers=layers, mtp=None if mtp is None else MtpQuality(**_tuples(mtp)))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def text_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of token ids, each between the begin and the end token where the tokenizer has them.

    Returns:
        int64 `(n_tokens,)`.
    """
    before, after = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    # `verbose=False`: it would warn of every text that is longer than the context
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*before, *ids, *after)], dtype=torch.int64)


@torch.inference_mode()
def routing_report(
    model: nn.Module, stream: torch.Tensor, *, window: int, batch_size: int = 8, max_tokens: int | None = None
) -> RoutingReport:
    """Run a model over a text and count how many tokens choose each expert of each layer.

    The text is cut into windows that do not overlap, so that every token counts once; the last one may be shorter. The
    padding behind it is not counted.

    Args:
        model: a `DeepseekV3ForCausalLM`, or a model that holds one (PEFT's wrappers do).
        stream: the text's token ids, int64 `(n_tokens,)`.
        window: tokens of a window, at most `max_position_embeddings`.
        batch_size: windows that run together.
        max_tokens: of a longer text, so many whole windows' worth are taken, evenly spaced over it.

    Raises:
        ValueError: for a model without mixture-of-experts layers of this package, fewer than two tokens, or a window
            that is below 2 or above `max_tokens`.
    """
    language_model = next((module for module in model.modules() if isinstance(module, DeepseekV3ForCausalLM)), None)
    if language_model is None:
        raise ValueError(f"{type(model).__name__} holds no DeepseekV3ForCausalLM: was it loaded without the plugin?")
    config = language_model.config
    if not config.moe_layers:
        raise ValueError(f"`first_k_dense_replace={config.first_k_dense_replace}`: the model has no experts to count.")
    windows = text_windows(stream, window, max_tokens)

    was_training = language_model.training
    language_model.eval()
    try:
        return _measure(language_model, windows, window, batch_size)
    finally:
        if was_training:
            language_model.train()


def text_windows(stream: torch.Tensor, window: int, max_tokens: int | None = None) -> list[torch.Tensor]:
    """Cut a stream into windows that do not overlap; see `routing_report`, whose errors it raises."""
    if window < 2:
        raise ValueError(f"window={window} is not at least 2")
    if max_tokens is not None and max_tokens < window:
        raise ValueError(f"max_tokens={max_tokens} is less than one window of {window}")
    if stream.dim() != 1 or stream.numel() < 2:
        raise ValueError(f"the text's token ids must be a row of two or more, not of shape {tuple(stream.shape)}")
    windows = list(stream.split(window))
    if max_tokens is not None and stream.numel() > max_tokens:
        whole = len(stream) // window
        places = torch.linspace(0, whole - 1, max_tokens // window, dtype=torch.float64).round()
        windows = [windows[int(place)] for place in places]
    return windows


def _measure(model: DeepseekV3ForCausalLM, windows: list[torch.Tensor], window: int, batch_size: int) -> RoutingReport:
    loads = _Loads(model)
    main, depths = _Predictions(), [_Predictions() for _ in model.model.mtp_layers]
    batches = range(0, len(windows), batch_size)
    for first in tqdm(batches, desc="held-out text", unit="batch", leave=False, disable=None):
        batch = windows[first : first + batch_size]
        ids_BS = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        real_BS = torch.nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in batch], batch_first=True)
        labels_BS = ids_BS.masked_fill(real_BS == 0, -100)
        ids_BS = ids_BS.to(model.device)
        # Attention is causal, so that what lies behind a short window reaches none of its tokens: no mask is needed
        with loads.counting(real_BS.flatten().bool()):
            hidden_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        best_BS, nats, count = _predict(model.lm_head, hidden_BSD, shift_left(labels_BS, 1, -100))
        main.add(nats, count)
        if not depths:
            continue
        embeds_BSD = model.model.embed_tokens(ids_BS)
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
        layer_inputs = model.model.attention_inputs(embeds_BSD, None, positions, None)
        for depth, (layer, predictions) in enumerate(zip(model.model.mtp_layers, depths)):
            hidden_BSD = layer(hidden_BSD, shift_left(embeds_BSD, depth + 1, 0.0), **layer_inputs)
            draft_BS, nats, count = _predict(model.lm_head, hidden_BSD, mtp_labels(labels_BS, depth))
            predictions.add(nats, count)
            # The main model predicts the same token depth + 1 places on, where that place is a token of the window
            compared_BS = shift_left(real_BS, depth + 1, 0) == 1
            predictions.agreed += int((draft_BS == shift_left(best_BS, depth + 1, -1))[compared_BS].sum())
            predictions.compared += int(compared_BS.sum())

    mtp = None
    if depths and all(predictions.count for predictions in depths):
        mtp = MtpQuality(tuple(p.agreed / p.compared for p in depths), tuple(p.nats / p.count for p in depths))
    return RoutingReport(
        n_experts=model.config.n_routed_experts,
        experts_per_token=model.config.num_experts_per_tok,
        tokens=sum(piece.numel() for piece in windows),
        window=window,
        loss=main.nats / main.count,
        layers=loads.layers(),
        mtp=mtp,
    )


@dataclass
class _Predictions:
    nats: float = 0.0
    count: int = 0
    agreed: int = 0
    compared: int = 0

    def add(self, nats: float, count: int) -> None:
        self.nats += nats
        self.count += count


def _predict(head: nn.Module, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """Best tokens `(B, S)` on the CPU, sum of the cross-entropy in nats, and how many targets are not -100."""
    best, nats = [], 0.0
    for hidden_TD, targets_T in zip(
        hidden_BSD.flatten(0, 1).split(HEAD_TOKENS), targets_BS.flatten().split(HEAD_TOKENS)
    ):
        logits_TV = head(hidden_TD).float()
        best.append(logits_TV.argmax(dim=-1).cpu())
        nats += cross_entropy(logits_TV, targets_T.to(logits_TV.device), reduction="sum").item()
    return torch.cat(best).view(targets_BS.shape), nats, int((targets_BS != -100).sum())


class _Loads:
    """Counts what the routers of the main model's layers choose.

    Hooks are on the router modules themselves: whichever backend serves the experts, the routers are called.
    """

    def __init__(self, model: DeepseekV3ForCausalLM):
        self.numbers = model.config.moe_layers
        # A wrapper (PEFT's for modules that are trained whole) may hold a router and its copy, of which one is called
        self.routers: list[tuple[int, nn.Module]] = [
            (row, module)
            for row, number in enumerate(self.numbers)
            for module in model.model.layers[number].modules()
            if isinstance(module, DeepseekV3TopkRouter)
        ]
        self.counts_LE = torch.zeros(len(self.numbers), model.config.n_routed_experts, dtype=torch.int64)
        self.weights_LE = torch.zeros(self.counts_LE.shape, dtype=torch.float64)

    @contextmanager
    def counting(self, real_T: torch.Tensor) -> Iterator[None]:
        """Count within a block the tokens that `real_T`, boolean on the CPU, marks."""
        handles = [router.register_forward_hook(self._hook(row, real_T)) for row, router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, row: int, real_T: torch.Tensor) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            _, weights_TK, indices_TK = output
            # On the CPU, where adding up is exact and in one order on every machine
            chosen = indices_TK.cpu()[real_T].flatten()
            weights = weights_TK.cpu()[real_T].flatten().double()
            experts = self.counts_LE.shape[1]
            self.counts_LE[row] += torch.bincount(chosen, minlength=experts)
            self.weights_LE[row] += torch.bincount(chosen, weights, minlength=experts)

        return count

    def layers(self) -> tuple[LayerRouting, ...]:
        statistics = routing_statistics(self.counts_LE)
        layers = []
        for row, number in enumerate(self.numbers):
            counts, weights = self.counts_LE[row].tolist(), self.weights_LE[row].tolist()
            busiest = self.counts_LE[row].argsort(descending=True, stable=True)[:BUSIEST].tolist()
            layers.append(
                LayerRouting(
                    layer=number,
                    tokens_per_expert=tuple(counts),
                    mean_gate_weight=tuple(w / c if c else None for w, c in zip(weights, counts)),
                    busiest_experts=tuple(busiest),
                    utilisation=float(statistics.utilisation[row]),
                    max_violation=float(statistics.max_violation[row]),
                    load_entropy=float(statistics.load_entropy[row]),
                    dead_experts=int(statistics.dead_experts[row]),
                    above_half_fair=float(statistics.above_half_fair[row]),
                )
            )
        return tuple(layers)
