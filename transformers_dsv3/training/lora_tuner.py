"""PEFT's LoRA tuner for this architecture: names land where they say, adapters are loaded whole or not at all.

It serves native's classes too where the plugin is imported: an adapter that names native's class (`auto_mapping`) is
opened on it. For other models it is PEFT's class unchanged. `peft_tuners` registers it.
"""

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel
from transformers.utils import logging

from ..models.dsv3.checkpoint_conversion_dsv3 import official_name
from ..models.dsv3.language_model_dsv3 import Dsv3TrainedMixin
from .lora_targets import Resolved, applies, in_model, resolve
from .peft_mixins import BesideMtp, OfficialClass, base_of, refuse_quantized_copies, without_mtp


logger = logging.get_logger(__name__)


# Native's models too, and ours with a vision tower, which are none of these
ADAPTED = (DeepseekV3PreTrainedModel, Dsv3TrainedMixin)


class LoraModel(OfficialClass, BesideMtp, lora.LoraModel):
    """`LoraModel` that reads target names of `deepseek_v3` models as the official checkpoint's names."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._misfits.pop(adapter_name, None)
        if not isinstance(model, ADAPTED) or kwargs.get("state_dict") is not None:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        refuse_quantized_copies(self.peft_config[adapter_name], model)
        with without_mtp(model, self.peft_config[adapter_name]):
            self._inject_resolved(model, adapter_name, *args, **kwargs)

    def _inject_resolved(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: LoraConfig = self.peft_config[adapter_name]
        self._prepare_model(config, model)  # which may repeat layers: names are read in what comes of it
        self._is_prepared = True
        try:
            resolved = resolve(config, model)
            refuse_quantized(resolved.parameters, model)
            self._inject(model, adapter_name, resolved, *args, **kwargs)
        finally:
            del self._is_prepared

    def _inject(self, model: nn.Module, adapter_name: str, resolved: Resolved, *args: Any, **kwargs: Any) -> None:
        config: LoraConfig = self.peft_config[adapter_name]
        if not resolved.modules and not resolved.parameters:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)  # PEFT says that nothing was found
        given = config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern
        config.rank_pattern, config.alpha_pattern = resolved.rank_pattern, resolved.alpha_pattern
        # PEFT reads names its own way first, then calls `_check_new_adapter_config`, where these are given back
        config.target_modules, config.target_parameters = set(), []
        self._resolved = resolved
        try:
            with warnings.catch_warnings():
                # PEFT looks for the patterns' keys among modules only, though they apply to parameters as well
                for pattern in (config.rank_pattern, config.alpha_pattern):
                    unmatched = [key for key in pattern if not applies(key, resolved.modules)]
                    applied = sorted(key for key in unmatched if applies(key, resolved.parameter_names))
                    message = f".*did not match any targeted module.*{re.escape(str(applied))}"
                    warnings.filterwarnings("ignore", message)
                # That MTP layers are hidden, or not, was decided above, by the names as they were given
                super(BesideMtp, self).inject_adapter(model, adapter_name, *args, **kwargs)
            config.target_modules, config.target_parameters = resolved.written_modules, resolved.written_parameters
        except BaseException:
            config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern = given
            raise
        finally:
            self.__dict__.pop("_resolved", None)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if (own := getattr(base, "lora_class", None)) is not None:
            made: nn.Module = own(target, adapter_name, config=lora_config, **kwargs)
            return made
        return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: weights are quantised: merging rounds them, which `unmerge_adapter` could not take back.
        """
        if _quantized_layers(self.model):
            raise ValueError(
                "merge_adapter: merging into quantised weights rounds them and cannot be undone. Use "
                "`merge_and_unload`, which says what it costs."
            )
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Says what rounding cost where adapters were merged into quantised weights: the model's `merge_costs`.

        Raises:
            ValueError: an adapter has values that are not finite. Nothing is merged then.
        """
        layers = _quantized_layers(self.model) if merge else []
        for name, layer in layers:
            if not all(bool(p.isfinite().all()) for key, p in layer.named_parameters() if ".lora_" in f".{key}"):
                raise ValueError(f"The adapter of {name} has values that are not finite; nothing was merged.")
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        costs = {
            f"{name}.{weight}": cost
            for name, layer in layers
            for weight, cost in getattr(layer, "merge_costs", {}).items()
        }
        if costs:
            model.merge_costs = costs
            total = sum(list(costs.values())[1:], next(iter(costs.values())))
            worst = max(costs, key=lambda name: costs[name].share_of_change)
            logger.warning(
                f"Adapters were merged into {len(costs)} quantised weights, which were rounded anew: {total}. Most in "
                f"{worst}, {costs[worst].share_of_change:.0%}."
            )
        return model

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if not getattr(self, "_is_prepared", False):
            super()._prepare_model(peft_config, model)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        resolved = self.__dict__.pop("_resolved", None)
        if resolved is None:
            return super()._check_new_adapter_config(config)
        # Compared with the configs of adapters that are there already
        config.target_modules, config.target_parameters = resolved.written_modules, resolved.written_parameters
        super()._check_new_adapter_config(config)
        config.target_modules, config.target_parameters = set(resolved.modules), resolved.parameters

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """MTP layers are numbered behind the others in files."""
        tensors = super()._get_adapter_state_dict(model, *args, **kwargs)
        base = base_of(model)
        if not isinstance(base, ADAPTED):
            return tensors
        return {official_name(name, base.config): tensor for name, tensor in tensors.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Notes what has no place, or is not there; PEFT drops it without a word."""
        remap = super()._remap_adapter_state_dict_for_load
        options = {"model": model, "config": config, "adapter_name": adapter_name}
        base = base_of(model)
        if not isinstance(base, ADAPTED):
            return remap(state_dict=state_dict, **options)
        places = adapter_places(model, adapter_name)
        # PEFT takes it that gates and ups are adapted within a second wrapper, the down projections'
        renamed = {}
        for name, tensor in state_dict.items():
            name = in_model(name, base)
            outer = name.replace(".experts.base_layer.", ".experts.")
            inner_place = _bare(name).replace(".weight", f".{adapter_name}.weight")
            renamed[name if outer in state_dict or inner_place in places else outer] = tensor
        state_dict = remap(state_dict=renamed, **options)
        if isinstance(tuner := getattr(model, "base_model", None), LoraModel):
            tuner._misfits[adapter_name] = misfits(places, state_dict)
        return state_dict

    @property
    def _misfits(self) -> dict[str, list[str]]:
        """By adapter, what was wrong when its weights were set last."""
        return self.__dict__.setdefault("_misfits_by_adapter", {})

    def _cast_adapter_dtype(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Refuses adapters whose tensors do not all have their place, or leave a place empty.

        PEFT calls this when it has loaded an adapter from a folder, and not after `set_peft_model_state_dict`, which
        returns what is missing or unexpected to its caller.

        Raises:
            ValueError: the adapter does not fit.
        """
        if problems := self._misfits.pop(adapter_name, None):
            raise ValueError(f"Adapter {adapter_name!r} does not fit this model: {'; '.join(problems)}.")
        super()._cast_adapter_dtype(adapter_name, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Says of what PyTorch reports as a size mismatch where it comes from.

        Tensors that `ignore_mismatched_sizes` leaves out are no longer here.
        """
        *_, error_msgs = args
        places = {f"{prefix}{name}": tensor.shape for name, tensor in self.named_parameters() if ".lora_" in name}
        differing = [name for name in places.keys() & state_dict.keys() if state_dict[name].shape != places[name]]
        if any(".experts." in name for name in differing):
            error_msgs.append("Was this adapter trained for another number of experts?")
        super()._load_from_state_dict(state_dict, prefix, *args)


Dsv3LoraModel = LoraModel  # its name before


def _quantized_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Adapters over quantised weights of this package, with their layer's name."""
    return [
        (name.replace(".base_layer", ""), module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer(), "lora_class")
    ]


def refuse_quantized(targets: list[str], model: nn.Module) -> None:
    """
    Args:
        targets: ends of the names of parameters that are to be adapted.

    Raises:
        ValueError: one of them has whole numbers, to which PEFT would add an adapter's product.
    """
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_stack = hasattr(module, "lora_class") and parameter.dim() == 3
        is_named = any(name == end or name.endswith(f".{end}") for end in targets)
        if is_named and not parameter.is_floating_point() and not is_stack:
            raise ValueError(
                f"target_parameters: {name} has quantised weights, which PEFT cannot adapt by that name. Name the "
                "layer in target_modules."
            )


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


def adapter_places(model: nn.Module, adapter_name: str) -> set[str]:
    """Names of an adapter's tensors in a model."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    return {_bare(name) for name in model.state_dict() if own.search(name)}


def misfits(places: set[str], state_dict: dict[str, torch.Tensor]) -> list[str]:
    """What an adapter's tensors lack of those that a model has places for, and what they have beside these.

    Args:
        places: of the adapter in the model.
        state_dict: the adapter's weights by the names of the model's.
    """
    given = {_bare(name) for name in state_dict if ".lora_" in name}
    problems = []
    if extra := sorted(given - places):
        problems.append(f"it has weights for what this model does not adapt or have: {_some(extra)}")
    if missing := sorted(places - given):
        problems.append(f"it lacks weights of {_some(missing)}")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
