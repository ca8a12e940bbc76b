"""PEFT's LoRA tuner for this architecture: names land where they say, adapters are loaded whole or not at all.

Registered in PEFT's own table of tuners, `PEFT_TYPE_TO_TUNER_MAPPING`. For other models it is PEFT's class unchanged.
"""

import re
import warnings
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftType
from peft.tuners.lora import LoraModel
from torch import nn

from ..models.dsv3.modeling_dsv3 import DeepseekV3PreTrainedModel
from .lora_targets import applies, resolve


class Dsv3LoraModel(LoraModel):
    """`LoraModel` that reads target names of `deepseek_v3` models as the official checkpoint's names."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, DeepseekV3PreTrainedModel) or kwargs.get("state_dict") is not None:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: LoraConfig = self.peft_config[adapter_name]
        resolved = resolve(config, model)
        if not resolved.modules and not resolved.parameters:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)  # PEFT says that nothing was found
        given = config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern
        config.rank_pattern, config.alpha_pattern = resolved.rank_pattern, resolved.alpha_pattern
        # PEFT reads names its own way first, then calls `_check_new_adapter_config`, where these are given back
        config.target_modules, config.target_parameters = set(), []
        self._resolved = set(resolved.modules), sorted(resolved.parameters)
        try:
            with warnings.catch_warnings():
                # PEFT looks for the patterns' keys among modules only, though they apply to parameters as well
                for pattern in (config.rank_pattern, config.alpha_pattern):
                    unmatched = [key for key in pattern if not applies(key, resolved.module_names)]
                    applied = sorted(key for key in unmatched if applies(key, resolved.parameter_names))
                    message = f".*did not match any targeted module.*{re.escape(str(applied))}"
                    warnings.filterwarnings("ignore", message)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            # From 20 names on PEFT shortens them, by what modules there are: `gate_proj` would mean routed experts too
            config.target_modules = set(resolved.modules)
        except BaseException:
            config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern = given
            raise
        finally:
            self.__dict__.pop("_resolved", None)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        if (resolved := self.__dict__.pop("_resolved", None)) is not None:
            config.target_modules, config.target_parameters = resolved
        super()._check_new_adapter_config(config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuses adapters whose tensors do not all have their place, or leave a place empty."""
        remap = super()._remap_adapter_state_dict_for_load
        options = {"model": model, "config": config, "adapter_name": adapter_name}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(base, DeepseekV3PreTrainedModel):
            return remap(state_dict=state_dict, **options)
        places = adapter_places(model, adapter_name)
        # PEFT takes it that gates and ups are adapted within a second wrapper, the down projections'
        renamed = {}
        for name, tensor in state_dict.items():
            outer = name.replace(".experts.base_layer.", ".experts.")
            inner_place = _bare(name).replace(".weight", f".{adapter_name}.weight")
            renamed[name if outer in state_dict or inner_place in places else outer] = tensor
        state_dict = remap(state_dict=renamed, **options)
        check_adapter_fits(places, adapter_name, state_dict)
        return state_dict


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


def adapter_places(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's tensors in a model."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    return {_bare(name): tensor.shape for name, tensor in model.state_dict().items() if own.search(name)}


def check_adapter_fits(places: dict[str, torch.Size], adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless an adapter's tensors are those that the model has places for.

    Args:
        places: of the adapter in the model.
        state_dict: the adapter's weights by the names of the model's.
    """
    given = {_bare(name): tensor.shape for name, tensor in state_dict.items() if ".lora_" in name}
    problems = []
    if extra := sorted(given.keys() - places.keys()):
        problems.append(f"it has weights for what this model does not adapt or have: {_some(extra)}")
    if missing := sorted(places.keys() - given.keys()):
        problems.append(f"it lacks weights of {_some(missing)}")
    differing = [name for name in sorted(given.keys() & places.keys()) if given[name] != places[name]]
    if differing:
        shapes = [f"{name} is {tuple(given[name])}, not {tuple(places[name])}" for name in differing]
        experts = any(".experts." in name for name in differing)
        problems.append(
            f"shapes differ: {_some(shapes)}" + (" (was it trained for another number of experts?)" if experts else "")
        )
    if problems:
        raise ValueError(f"Adapter {adapter_name!r} does not fit this model: {'; '.join(problems)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def register() -> None:
    """Makes PEFT use `Dsv3LoraModel` for LoRA."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Dsv3LoraModel


def unregister() -> None:
    """Gives PEFT its own tuner back."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
