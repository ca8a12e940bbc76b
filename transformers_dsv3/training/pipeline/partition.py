"""Where a model is cut into stages, and which modules each of them needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...option_error import OptionError


@dataclass(frozen=True)
class Part:
    """A piece of the model that no cut divides.

    Attributes:
        kind: "embedding", "attention", "network" (dense, or a mixture of experts), "head" (with the last norm and the
            loss) or "mtp" (all MTP layers, with their use of the head).
        layer: of attention and network, counted from 0; of the embedding 0, of the others `num_hidden_layers`.
    """

    kind: str
    layer: int

    @property
    def name(self) -> str:
        return f"{self.layer} {self.kind}" if self.kind in ("attention", "network") else self.kind


def model_parts(decoder: Any) -> list[Part]:
    """The parts of a `DeepseekV3Model` with a head, in the order of computation."""
    layers = decoder.config.num_hidden_layers
    parts = [Part("embedding", 0)]
    for layer in range(layers):
        parts += [Part("attention", layer), Part("network", layer)]
    parts.append(Part("head", layers))
    return parts + [Part("mtp", layers)] if decoder.mtp_layers else parts


def modules_of(part: Part, model: Any) -> list[nn.Module]:
    """The modules that compute a part. MTP layers that are trained need embedding and head as well."""
    decoder = model.get_decoder()
    if part.kind == "embedding":
        return [decoder.embed_tokens]
    if part.kind == "head":
        return [decoder.norm, model.lm_head]
    if part.kind == "mtp":
        trained = any(layer.is_trained for layer in decoder.mtp_layers)
        return [decoder.mtp, decoder.embed_tokens, model.lm_head] if trained else [decoder.mtp]
    layer = decoder.layers[part.layer]
    if part.kind == "attention":
        return [layer.input_layernorm, layer.self_attn]
    return [layer.post_attention_layernorm, layer.mlp]


def multiplied_weights(part: Part, model: Any) -> float:
    """Weights in the matrix products of one token, the cost of a part by arithmetic."""
    decoder = model.get_decoder()
    share = decoder.config.active_expert_share

    def count(module: nn.Module) -> float:
        return sum(
            parameter.numel() * (share if ".experts." in f".{name}" else 1)
            for name, parameter in module.named_parameters()
            if parameter.dim() > 1
        )

    if part.kind == "embedding":
        return 0.0
    if part.kind == "mtp":
        trained = [layer for layer in decoder.mtp_layers if layer.is_trained]
        return sum(count(layer) + model.lm_head.weight.numel() for layer in trained)
    return sum(count(module) for module in modules_of(part, model))


def cut_by_cost(costs: list[float], stages: int) -> list[int]:
    """Index of the part that each stage begins with, such that the dearest stage is as cheap as can be.

    Of several such cuts the one with the least sum of squares. Every stage has at least one part.
    """
    number = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[n] of s stages over the first n parts: dearest stage, sum of squares, where the last of them begins
    best: list[list[tuple[float, float, int]]] = [[(0.0, 0.0, 0)] + [(float("inf"), 0.0, 0)] * number]
    for stage in range(1, stages + 1):
        row = [(float("inf"), 0.0, 0)] * (number + 1)
        for end in range(stage, number + 1):
            row[end] = min(
                (
                    max(best[-1][start][0], sums[end] - sums[start]),
                    best[-1][start][1] + (sums[end] - sums[start]) ** 2,
                    start,
                )
                for start in range(stage - 1, end)
            )
        best.append(row)
    starts, end = [], number
    for stage in range(stages, 0, -1):
        end = best[stage][end][2]
        starts.append(end)
    return starts[::-1]


def cut_model(model: Any, cut: str, stages: int) -> list[list[Part]]:
    """The parts of each stage.

    Args:
        cut: as in `PipelineArguments`.

    Raises:
        OptionError: for places that the model does not have.
    """
    parts = model_parts(model.get_decoder())
    layers = model.get_decoder().config.num_hidden_layers
    if cut == "cost":
        # The embedding goes with the first part: no stage of it alone, which would have nothing to do
        costs = [multiplied_weights(part, model) for part in parts[1:]]
        starts = [start + 1 for start in cut_by_cost(costs, stages)]
    else:
        starts = [parts.index(part) for part in _asked_for(cut, layers, stages)]
    starts[0] = 0
    return [parts[start:end] for start, end in zip(starts, [*starts[1:], len(parts)])]


def _asked_for(cut: str, layers: int, stages: int) -> list[Part]:
    if cut == "layers":
        places = [float(stage * layers // stages) for stage in range(stages)]
    else:
        try:
            places = [0.0, *(float(place) for place in cut.split(","))]
        except ValueError:
            raise OptionError("cut", f"`cut={cut!r}`: must be 'cost', 'layers' or places such as '3,6.5'") from None
        if len(places) != stages:
            raise OptionError(
                "cut", f"`cut={cut!r}`: {stages} stages begin at {stages - 1} places, not {len(places) - 1}"
            )
        if places != sorted(set(places)) or places[-1] >= layers or any(2 * place % 1 for place in places):
            raise OptionError(
                "cut", f"`cut={cut!r}`: places must rise, in steps of 0.5, and lie below {layers} layers"
            )
    return [Part("network", int(place)) if place % 1 else Part("attention", int(place)) for place in places]


def describe_cut(stages: list[list[Part]], ranks: list[int], costs: dict[Part, float]) -> str:
    """A table of the stages: where each is, what it holds, its share of the cost."""
    total = sum(costs.values()) or 1.0
    lines = ["stage  rank  from         to           share"]
    for number, (parts, rank) in enumerate(zip(stages, ranks)):
        share = sum(costs[part] for part in parts) / total
        lines.append(f"{number:5d}  {rank:4d}  {parts[0].name:<11s}  {parts[-1].name:<11s}  {share:.1%}")
    return "\n".join(lines)
