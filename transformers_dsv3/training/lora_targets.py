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
from torch import nn
from transformers.utils import logging


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
        doubled: those of them whose gates and ups were named apart, which PEFT adapts with twice the rank.
        names: all names that were found among the targets, those of single experts' projections included.
    """

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
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


def is_mtp(model: nn.Module, name: str) -> bool:
    """Whether a module lies in a layer of multi-token prediction: these stand after the decoder's."""
    index = layer_index(name)
    return index is not None and index >= model.config.num_hidden_layers


def place(config: LoraConfig, model: nn.Module) -> Placement:
    """Finds what the names in `target_modules` stand for. `target_parameters` stay as they are.

    `all-linear` is every linear layer and the routed experts, without the output head and without routers. A router is
    adapted only if `gate` is named, MTP layers, which are frozen under an adapter, only if their full names are.

    Args:
        config: not changed.
        model: the model to adapt, be it with other adapters on it.

    Raises:
        ValueError: if names stand for some of a layer's experts, or for their gates without their ups.
    """
    targets = config.target_modules or []
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    linear = [name for name, module in base_modules(model) if isinstance(module, nn.Linear)]
    if everything:
        # The output head is in no layer
        targets = [name for name in linear if layer_index(name) is not None] + list(STACKED)
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
    halves: list[str] = []

    def named(name: str) -> bool:
        found = check_target_module_exists(lookup, name)
        if not found or isinstance(found, _ExcludedModule):
            return False
        placement.names.append(name)
        return True

    for name, module in base_modules(model):
        if not name or (is_mtp(model, name) and (everything or name not in listed)):
            continue
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            whole = set()
            for projection in STACKED:
                experts = [e for e in range(module.num_experts) if named(f"{name}.{e}.{projection}")]
                if len(experts) == module.num_experts or named(f"{name}.{projection}"):
                    whole.add(projection)
                elif experts:
                    partly.append(f"{name}.{experts[0]}.{projection}")
            if named(f"{name}.gate_up_proj"):
                placement.parameters.append(f"{name}.gate_up_proj")
            elif {"gate_proj", "up_proj"} <= whole:
                placement.parameters.append(f"{name}.gate_up_proj")
                placement.doubled.append(f"{name}.gate_up_proj")
            else:
                halves.extend(f"{name}.{projection}" for projection in whole - {"down_proj"})
            if "down_proj" in whole:
                placement.parameters.append(f"{name}.down_proj")
        elif hasattr(module, "e_score_correction_bias"):
            # A regular expression that matches a whole MLP does not name the router
            if (listed or re.search(r"gate(?!_)", str(targets))) and named(name):
                placement.parameters.append(f"{name}.weight")
        elif (name in linear or listed) and named(name):
            placement.modules.append(name)  # PEFT says what it cannot adapt
    if partly:
        raise ValueError(
            f"target_modules names some of a layer's routed experts, such as {partly[0]}. Their weights are one "
            "parameter, which LoRA adapts for all experts or none: name `experts.gate_proj`, `experts.up_proj` and "
            "`experts.down_proj`. To train some experts only, see ESFT (examples/esft.md)."
        )
    if halves:
        raise ValueError(
            f"target_modules names {halves[0]} without its other half: gates and ups of routed experts are one "
            "parameter. Name both, or leave the routed experts out by `shared_experts.gate_proj`, `mlp.gate_proj`."
        )
    return placement


def suffixes(names: list[str], model: nn.Module, parameters: bool = False) -> list[str]:
    """Short names that stand for the given ones and no others; the names themselves where there are none.

    Short ones are the last two parts, which tell MLPs apart, so that they mean the same when they are read again:
    `mlp.gate_proj` (dense layers), `shared_experts.gate_proj`, `self_attn.o_proj`, `experts.down_proj`. Beside MTP
    layers, which have the same parts and are not adapted, there are none.
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
        short.append(suffix if by_suffix[suffix] <= found else name)
    return sorted(set(short))


def resolve(config: LoraConfig, model: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """`target_modules` and `target_parameters` for what the config names, and which of the latter get twice the rank.

    Names that stand for nothing are left out, and said: PEFT says so only if nothing at all is found.
    """
    placement = place(config, model)
    if placement.names and not isinstance(config.target_modules, str):
        found = [
            target
            for target in config.target_modules or []
            if any(name == target or name.endswith(f".{target}") for name in placement.names)
        ]
        if lost := sorted(set(config.target_modules or []) - set(found)):
            linear = sorted({name.split(".")[-1] for name, m in base_modules(model) if isinstance(m, nn.Linear)})
            logger.warning(
                f"target_modules: this model has no {', '.join(lost)}, nothing is adapted for it. Its linear layers "
                f"are {', '.join(linear)}."
            )
    # Of parameters, which PEFT finds by the end of their names too, those of MTP layers are left out
    given = set(config.target_parameters or [])
    existing = [re.sub(r"(\.base_layer)+", "", name) for name, _ in model.named_parameters()]
    hit = [name for name in existing if any(name == end or name.endswith(f".{end}") for end in given)]
    if any(is_mtp(model, name) and name not in given for name in hit):
        given = {name for name in hit if name in given or not is_mtp(model, name)}
    doubled = suffixes(placement.doubled, model, parameters=True)
    parameters = given | set(suffixes(placement.parameters, model, parameters=True))
    return set(suffixes(placement.modules, model)), parameters, set(doubled)
