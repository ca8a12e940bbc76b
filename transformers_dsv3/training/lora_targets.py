"""Where a `peft.LoraConfig` lands on a model whose routed experts are stacked in one parameter a projection.

PEFT takes `deepseek_v3` for a model all of whose MLPs are routed experts: `gate_proj`, `shared_experts.gate_proj` or
`all-linear` land on the routed experts alone, dense layers and shared experts are left out, and adapters of those are
dropped when they are loaded, without a word. Here each name is looked up among the names that the official checkpoint
has: those of modules, and for routed experts `layers.N.mlp.experts.E.gate_proj` and the like.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers.utils import logging

from ..models.dsv3.checkpoint_conversion_dsv3 import mtp_renamings, official_name
from ..models.dsv3.modeling_dsv3 import DeepseekV3Model


logger = logging.get_logger(__name__)

ALL_LINEAR = "all-linear"
# The stacked parameter that holds each of an expert's projections
STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


@dataclass
class Placement:
    """What an adapter adapts.

    Attributes:
        modules: names of linear layers (and of others that were named).
        parameters: names of stacked parameters of routed experts, and of routers that were named.
        halves: those of them whose gates and ups were named apart, which PEFT adapts with twice the rank.
        names: all names that were found among the targets, those of single experts' projections included.
    """

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    halves: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def layer_index(name: str) -> int | None:
    """The decoder layer of a module's name, None outside the layers."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Names and modules of a model as they are without the adapters that are already there."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
            module = module.get_base_layer()
        yield name, module


def of_text(model: nn.Module) -> str:
    """Where the names of the decoder's modules begin, in a model that may have a vision tower too."""
    return next((name for name, module in model.named_modules() if isinstance(module, DeepseekV3Model)), "")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, be its weights quantised by this package."""
    return isinstance(module, nn.Linear) or (hasattr(module, "lora_class") and hasattr(module, "in_features"))


def is_mtp(name: str) -> bool:
    """Whether a module lies in a layer of multi-token prediction."""
    return re.search(r"(?:^|\.)mtp\.\d+\.", name) is not None


def in_model(name: str, model: nn.Module) -> str:
    """The name in the model of a module that was named as in the official checkpoint, which differs for MTP layers."""
    for renaming in mtp_renamings(model.config, getattr(model, "decoder_prefix", "")):
        name, _ = renaming.rename_source_key(name)
    return name


def place(config: LoraConfig, model: nn.Module) -> Placement:
    """Finds what the names in `target_modules` stand for. `target_parameters` stay as they are.

    `all-linear` is every linear layer and the routed experts, without the output head, routers and a vision tower. A
    router is adapted only if `gate` is named, MTP layers, frozen under an adapter, only if their full names are.

    Args:
        config: not changed.
        model: the model to adapt, be it with other adapters on it.

    Raises:
        ValueError: if names stand for some of a layer's experts, or for their gates without their ups.
    """
    targets = config.target_modules or []
    if not isinstance(targets, str):
        targets = {in_model(name, model) for name in targets}
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    linear = [name for name, module in base_modules(model) if is_linear(module)]
    if everything:
        # The output head is in no layer, nor is a vision tower's in a layer of the text
        within = [name for name in linear if name.startswith(of_text(model))]
        targets = [name for name in within if layer_index(name) is not None] + list(STACKED)
    listed = set() if isinstance(targets, str) else set(targets)
    lookup = LoraConfig(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    placement = Placement()
    partly: list[str] = []
    single: list[str] = []

    def found(name: str) -> bool | None:
        """Whether a name is among the targets; None if it is excluded."""
        match = check_target_module_exists(lookup, name)
        if isinstance(match, _ExcludedModule):
            return None
        if match:
            placement.names.append(name)
        return bool(match)

    for name, module in base_modules(model):
        if not name or (is_mtp(name) and (everything or name not in listed)):
            continue
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            whole = set()
            for projection, stack in STACKED.items():
                if found(name) is None or found(f"{name}.{stack}") is None:
                    continue
                each = [found(f"{name}.{expert}.{projection}") for expert in range(module.num_experts)]
                together = found(f"{name}.{projection}")
                if together is None or (together and None not in each) or all(each):
                    whole.update([projection] if together is not None else [])
                elif any(each) or together:
                    expert = each.index(None) if None in each else next(e for e, hit in enumerate(each) if hit)
                    partly.append(f"{name}.{expert}.{projection}")
            if found(f"{name}.gate_up_proj"):
                placement.parameters.append(f"{name}.gate_up_proj")
            elif {"gate_proj", "up_proj"} <= whole:
                placement.parameters.append(f"{name}.gate_up_proj")
                placement.halves.append(f"{name}.gate_up_proj")
            else:
                single.extend(f"{name}.{projection}" for projection in whole - {"down_proj"})
            if "down_proj" in whole:
                placement.parameters.append(f"{name}.down_proj")
        elif hasattr(module, "e_score_correction_bias"):
            # A regular expression that matches more of an MLP does not name the router, though it may match it
            if (listed or re.search(r"gate\)*\$?$", str(targets))) and found(name):
                placement.parameters.append(f"{name}.weight")
        elif (name in linear or listed) and found(name):
            placement.modules.append(name)  # PEFT says what it cannot adapt
    if partly:
        raise ValueError(
            f"Targets name or exclude some of a layer's routed experts, such as {partly[0]}. Their weights are one "
            "parameter, which LoRA adapts for all experts or none: name `experts.gate_proj`, `experts.up_proj` and "
            "`experts.down_proj`. To train some experts only, see ESFT (examples/esft.md)."
        )
    if single:
        raise ValueError(
            f"target_modules names {single[0]} without its other half: gates and ups of routed experts are one "
            "parameter. Name both, or leave the routed experts out by `shared_experts.gate_proj`, `mlp.gate_proj`."
        )
    return placement


def suffixes(names: list[str], model: nn.Module, parameters: bool = False) -> list[str]:
    """Short names that stand for the given ones and no others; the names themselves where there are none.

    Short ones are the last two parts, which tell MLPs apart, so that they mean the same when they are read again:
    `mlp.gate_proj` (dense layers), `shared_experts.gate_proj`, `self_attn.o_proj`, `experts.down_proj`.
    """
    if parameters:
        existing = [name for name, _ in model.named_parameters()]
        existing = [re.sub(r"(\.base_layer)+", "", name) for name in existing]
    else:
        existing = [name for name, _ in base_modules(model)]
    found, by_suffix = set(names), defaultdict(set)
    for name in existing:
        by_suffix[".".join(name.split(".")[-2:])].add(name)
    short = []
    for name in names:
        suffix = ".".join(name.split(".")[-2:])
        short.append(suffix if by_suffix[suffix] and by_suffix[suffix] <= found else name)
    return sorted(set(short))


@dataclass
class Resolved:
    """What a config stands for, in PEFT's terms.

    Attributes:
        modules, parameters: `target_modules`, as full names, and `target_parameters`.
        written_modules, written_parameters: the same as the adapter's config says it from then on.
        rank_pattern, alpha_pattern: the config's own, with what stacked parameters need.
        parameter_names: full names of the parameters, and those of their halves and experts.
    """

    modules: list[str]
    parameters: list[str]
    written_modules: set[str]
    written_parameters: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    parameter_names: list[str]


def applies(pattern: str, names: Iterable[str]) -> bool:
    """Whether a key of PEFT's rank or alpha pattern is for one of the names."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def single_names(parameter: str) -> list[str]:
    """Names of what a stacked parameter holds: its projections, and a first expert's."""
    experts, stack = parameter.rsplit(".", 1)
    projections = [projection for projection, of in STACKED.items() if of == stack]
    return [f"{experts}.{within}{p}" for p in projections for within in ("", "0.")]


def resolve(config: LoraConfig, model: nn.Module) -> Resolved:
    """What PEFT has to be told for the layers that the config's names stand for.

    Names that stand for nothing are left out, and said: PEFT says so only if nothing at all is found.

    Raises:
        ValueError: see [`place`]; and if gates and ups of routed experts are given different ranks or alphas.
    """
    placement = place(config, model)
    if placement.names and not isinstance(config.target_modules, str):
        targets = {in_model(name, model) for name in config.target_modules or []}
        lost = {t for t in targets if not any(name == t or name.endswith(f".{t}") for name in placement.names)}
        if lost:
            linear = sorted({name.split(".")[-1] for name, m in base_modules(model) if is_linear(m)})
            logger.warning(
                f"target_modules: this model has no {', '.join(sorted(lost))}, nothing is adapted for it. Its linear "
                f"layers are {', '.join(linear)}."
            )
    given = {in_model(name, model) for name in config.target_parameters or []}
    existing = [re.sub(r"(\.base_layer)+", "", name) for name, _ in model.named_parameters()]
    hit = [name for name in existing if any(name == end or name.endswith(f".{end}") for end in given)]
    if lost := {end for end in given if not any(name == end or name.endswith(f".{end}") for name in hit)}:
        logger.warning(f"target_parameters: this model has no {', '.join(sorted(lost))}, nothing is adapted for it.")
    # Of parameters, which PEFT finds by the end of their names too, those of MTP layers are left out
    if any(is_mtp(name) and name not in given for name in hit):
        given = {name for name in hit if name in given or not is_mtp(name)}
    ranks, alphas = _stacked_patterns(config, placement)
    stacked = suffixes(placement.parameters, model, parameters=True)
    return Resolved(
        placement.modules,
        sorted(given | set(stacked)),
        _written(config, placement, model),
        list(dict.fromkeys([*(config.target_parameters or []), *stacked])),
        {key: round(value) for key, value in _pattern(config.rank_pattern, ranks, placement, model).items()},
        _pattern(config.alpha_pattern, alphas, placement, model),
        [name for parameter in {*hit, *placement.parameters} for name in (parameter, *_halves(parameter))],
    )


# What plain PEFT takes for routed experts, whatever it belongs to
TAKEN_FOR_EXPERTS = {"gate", *STACKED}


def _written(config: LoraConfig, placement: Placement, model: nn.Module) -> set[str]:
    """The modules' names for `adapter_config.json`.

    As they were given, where plain PEFT reads them as they are meant. Of embeddings the bare names are kept, by which
    PEFT knows that their base weights are to be saved with the adapter.
    """
    given = set() if isinstance(config.target_modules, str) else set(config.target_modules or [])
    if given and not placement.parameters and not any(name.split(".")[-1] in TAKEN_FOR_EXPERTS for name in given):
        return given
    names = suffixes([official_name(name, model.config) for name in placement.modules], model)
    bare = set(EMBEDDING_LAYER_NAMES) & (given or {name.split(".")[-1] for name in placement.modules})
    return {name for name in names if name.split(".")[-1] not in bare} | {
        name.split(".")[-1] for name in names if name.split(".")[-1] in bare
    }


def _halves(parameter: str) -> list[str]:
    return single_names(parameter) if parameter.endswith(tuple(STACKED.values())) else []


def _stacked_patterns(config: LoraConfig, placement: Placement) -> tuple[dict[str, float], dict[str, float]]:
    """Rank and alpha of stacked parameters where these are not what PEFT would take for their names.

    A pattern for `gate_proj` is for the gates within `gate_up_proj`. Gates and ups named apart get twice the rank on
    their stack, and the alpha that keeps the scale.
    """
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for parameter in placement.parameters:
        if not parameter.endswith(tuple(STACKED.values())):
            continue
        rank, of_stack = _given("rank", config.rank_pattern, parameter, config.r)
        alpha, _ = _given("alpha", config.alpha_pattern, parameter, config.lora_alpha)
        if parameter in placement.halves and not of_stack:
            rank, alpha = 2 * rank, alpha * (2**0.5 if config.use_rslora else 2)
        ranks[parameter], alphas[parameter] = rank, alpha
    return (
        {name: rank for name, rank in ranks.items() if rank != config.r or config.rank_pattern},
        {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha or config.alpha_pattern},
    )


def _given(what: str, pattern: dict[str, float], parameter: str, default: float) -> tuple[float, bool]:
    """The value that a pattern has for a stacked parameter, and whether by the stack's own name."""
    key = next((key for key in pattern if applies(key, [parameter, *single_names(parameter)])), None)
    if key is None:
        return default, False
    if applies(key, [parameter]):
        return pattern[key], True
    values = {}
    for projection in (name for name, stack in STACKED.items() if parameter.endswith(stack)):
        names = [name for name in single_names(parameter) if name.endswith(projection)]
        values[projection] = next((value for key, value in pattern.items() if applies(key, names)), default)
    if len(set(values.values())) > 1:
        raise ValueError(
            f"{what}_pattern: gates and ups of routed experts are one parameter, {parameter}: give them one {what}"
        )
    return next(iter(values.values())), False


def _pattern(
    given: dict[str, float], stacked: dict[str, float], placement: Placement, model: nn.Module
) -> dict[str, float]:
    """The config's pattern with the values of stacked parameters.

    PEFT takes the first key that matches, and sorts keys when it saves. So where a key of the config matches a stacked
    parameter that has another value, all keys give way to names.
    """
    values = stacked
    if any(applies(key, [name]) and value != stacked[name] for key, value in given.items() for name in stacked):
        values = {
            name: value
            for name in [*placement.modules, *placement.parameters]
            if (value := stacked.get(name, next((v for k, v in given.items() if applies(k, [name])), None)))
            is not None
        }
        given = {}
    pattern = {}
    for value in set(values.values()):
        names = [name for name in values if values[name] == value]
        for parameters in (False, True):
            of_kind = [name for name in names if (name in placement.parameters) == parameters]
            pattern.update({re.escape(short): value for short in suffixes(of_kind, model, parameters)})
    return {**pattern, **given}
