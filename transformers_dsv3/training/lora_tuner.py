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

from ..models.dsv3.modeling_dsv3 import Dsv3PreTrainedModel
from .lora_targets import resolve


class Dsv3LoraModel(LoraModel):
    """`LoraModel` that reads target names of `deepseek_v3` models as the official checkpoint's names."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, Dsv3PreTrainedModel) or kwargs.get("state_dict") is not None:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: LoraConfig = self.peft_config[adapter_name]
        modules, parameters, doubled = resolve(config, model)
        if modules or parameters:  # else PEFT says that nothing was found
            for name in map(re.escape, doubled):
                config.rank_pattern.setdefault(name, 2 * config.r)
                config.alpha_pattern.setdefault(name, 2 * config.lora_alpha)
            # Given back in `_prepare_adapter_config`, which PEFT calls after it has read the names its own way
            config.target_modules, config.target_parameters = set(), []
            self._resolved = modules, parameters
        with warnings.catch_warnings():
            # PEFT looks for the patterns' keys among modules only, though they apply to parameters as well
            names = [name for name, _ in model.named_parameters() if name.endswith(tuple(parameters))]
            names += [name.replace("gate_up_proj", half) for name in names for half in ("gate_proj", "up_proj")]
            for pattern in (config.rank_pattern, config.alpha_pattern):
                applied = sorted(key for key in pattern if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
                warnings.filterwarnings("ignore", f".*did not match any targeted module.*{re.escape(str(applied))}")
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: Any) -> LoraConfig:
        if (resolved := self.__dict__.pop("_resolved", None)) is not None:
            peft_config.target_modules, peft_config.target_parameters = resolved[0], sorted(resolved[1])
        return super()._prepare_adapter_config(peft_config, model_config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuses adapters whose tensors do not all have their place, or leave a place empty."""
        state_dict = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(base, Dsv3PreTrainedModel):
            check_adapter_fits(model, adapter_name, state_dict)
        return state_dict


def check_adapter_fits(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless an adapter's tensors are those that the model has places for.

    Args:
        model: with the adapter's layers in place, its weights not read yet.
        state_dict: the adapter's weights by the names of the model's.
    """
    prefix = "base_model.model."
    given = {name.removeprefix(prefix): tensor.shape for name, tensor in state_dict.items() if ".lora_" in name}
    places = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in model.state_dict().items()
        if ".lora_" in name and f".{adapter_name}." in f"{name}."
    }
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
