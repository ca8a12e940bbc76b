"""LoRA (arXiv 2106.09685) within a budget: which layers of a DeepSeek-V3 to adapt, and with what rank."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn


if TYPE_CHECKING:
    from peft import LoraConfig

PARTS = ("attention", "dense", "shared_experts", "experts", "head")
PLACES: dict[str, tuple[str, ...]] = {
    **{part: (part,) for part in PARTS},
    "linear": ("attention", "dense", "shared_experts"),
    "mlp": ("dense", "shared_experts", "experts"),
    "all": ("attention", "dense", "shared_experts", "experts"),
}


# Arguments of `LoraConfig` that `lora_config` fills in
CHOSEN = {"r", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"}
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def part_of(name: str) -> str | None:
    """Which part of a decoder layer a linear layer belongs to; None outside of them."""
    for key, part in ((".self_attn.", "attention"), (".shared_experts.", "shared_experts"), (".mlp.", "dense")):
        if key in name:
            return part
    return None


def adaptable(model: nn.Module) -> dict[str, dict[str, int]]:
    """The weights that LoRA can adapt, by part of the layer: name, and the adapter's parameters a unit of rank.

    MTP layers, routers, embeddings and a vision tower are left out, as is an output head that shares the embedding's
    weight.
    """
    from .lora_targets import base_modules, is_linear, is_mtp, layer_index, of_text

    text = of_text(model)
    found: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, module in base_modules(model):
        if module is head and not tied:
            found["head"][name] = module.in_features + module.out_features
        if layer_index(name) is None or is_mtp(name) or not name.startswith(text):
            continue
        part = part_of(name)
        if is_linear(module) and part is not None and min(module.weight.shape):
            found[part][name] = module.in_features + module.out_features
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            for parameter in ("gate_up_proj", "down_proj"):
                own = getattr(module, "shape_of", None)  # of quantised ones
                experts, *shape = getattr(module, parameter).shape if own is None else own(parameter)
                found["experts"][f"{name}.{parameter}"] = experts * sum(shape)
    return found


def lora_config(
    model: nn.Module,
    budget: float | None = None,
    rank: int | None = None,
    where: str | Collection[str] = "auto",
    lora_alpha: float | None = None,
    **options: Any,
) -> LoraConfig:
    """A plain `peft.LoraConfig` for a DeepSeek-V3, within a budget of trainable parameters. Prints what it chose.

    Routed experts are adapted by `target_parameters`, each with a matrix pair of its own.

    Args:
        model: the model to adapt, before PEFT has touched it.
        budget: greatest share of trainable parameters, adapter over model, as 0.001.
        rank: rank of every adapted weight, in place of a budget.
        where: `"attention"`, `"dense"` (the MLPs of the first layers), `"shared_experts"`, `"experts"` (routed),
            `"linear"` (all but routed experts), `"mlp"` (all but attention), `"all"`, or several of them. `"auto"`
            takes "all" if the budget gives it a rank of at least 4, else "linear", else "attention"; with `rank`,
            "all".
        lora_alpha: scale of the adapter over its rank; twice the rank by default.
        options: further arguments of `LoraConfig`. What they train beside the factors (`modules_to_save`, `use_dora`)
            comes on top of the budget.

    Raises:
        ImportError: if PEFT is missing.
        ValueError: if neither or both of budget and rank are given, for a name that is no part, a part that the model
            lacks, a budget too small for rank 1, or an option that is chosen here.
    """
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise ImportError("lora_config needs PEFT: pip install peft") from error

    from .lora_targets import suffixes

    if (budget is None) == (rank is None):
        raise ValueError("lora_config: give one of budget, the share of trainable parameters, and rank.")
    if budget is not None and not 0 < budget < 1:
        raise ValueError(f"lora_config: budget={budget} is a share of the model's parameters, between 0 and 1.")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"lora_config: rank={rank} must be a whole number from 1 on.")
    if hasattr(model, "peft_config"):
        raise ValueError("lora_config: the model has adapters already; choose before PEFT wraps it.")
    if clash := CHOSEN & options.keys():
        raise ValueError(f"lora_config chooses {', '.join(sorted(clash))}: to set it yourself, use peft.LoraConfig.")
    if not where:
        raise ValueError(f"lora_config: where is empty; it takes auto, {', '.join(PLACES)}.")
    by_part = adaptable(model)
    total = model.num_parameters()
    if not any(by_part.values()):
        raise ValueError(f"lora_config: {type(model).__name__} has no layers that are known here.")

    def parts_of(place: str) -> list[str]:
        if place not in PLACES:
            raise ValueError(f"lora_config: where={place!r} is none of auto, {', '.join(PLACES)}.")
        parts = [part for part in PLACES[place] if by_part[part]]
        if not parts:
            raise ValueError(f"lora_config: where={place!r}, but the model has none of it.")
        return parts

    def cost(parts: Collection[str]) -> int:
        return sum(sum(by_part[part].values()) for part in parts)

    def largest_rank(parts: Collection[str]) -> int:
        return int(budget * total) // cost(parts) if budget is not None else rank or 0

    if where == "auto":
        choices = [parts_of(place) for place in ("all", "linear", "attention")]
        least = (4 if rank is None else 1, 1, 1)
        parts = next((p for p, r in zip(choices, least) if largest_rank(p) >= r), choices[-1])
    else:
        wanted = {part for place in ([where] if isinstance(where, str) else where) for part in parts_of(place)}
        parts = [part for part in PARTS if part in wanted]
    chosen = largest_rank(parts)
    if chosen < 1:
        fits = ", ".join(f"{part} {cost([part]) / total:.3%}" for part in PARTS if by_part[part])
        raise ValueError(
            f"lora_config: budget={budget} of {total:,} parameters is too small for rank 1 on {' and '.join(parts)}. "
            f"Rank 1 takes: {fits}."
        )
    names = [name for part in parts if part != "experts" for name in by_part[part]]
    stacked = list(by_part["experts"]) if "experts" in parts else []
    trainable = chosen * cost(parts)
    alpha = 2 * chosen if lora_alpha is None else lora_alpha
    if "head" in parts and budget is not None and len(parts) > 1:
        # One layer's rank can use what is too little for all layers'
        more = (int(budget * total) - trainable) // cost(["head"])
        if more:
            (head,) = by_part["head"]
            options["rank_pattern"] = {head: chosen + more}
            options["alpha_pattern"] = {head: alpha / chosen * (chosen + more)}
            trainable += more * cost(["head"])
    print(
        f"LoRA of rank {chosen}, alpha {alpha:g}, on {', '.join(parts).replace('_', ' ')}: {trainable:,} trainable "
        f"parameters, {trainable / total:.3%} of {total:,}."
    )
    # By the task PEFT knows that a classification head, which starts at random, is trained beside the adapter
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    options.setdefault("task_type", None if task is None else TaskType(task))
    return LoraConfig(
        r=chosen,
        lora_alpha=alpha,
        target_modules=suffixes(names, model),
        target_parameters=suffixes(stacked, model, parameters=True) or None,
        **options,
    )
