"""PEFT's tuners as they are on native's model: adapters name native's classes, and leave MTP layers alone."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ..models.dsv3.modeling_dsv3 import DeepseekV3Model
from .lora_targets import in_model, is_mtp


def base_of(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` is around, or the model itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(base, nn.Module)
    return base


def _official_class(official: type, is_prompt_tuning: bool = False) -> type:
    """In place of `PeftModel._get_base_model_class`."""
    return official


class OfficialClass:
    """Saved adapters name the base model's class by its official name and module, which every reader has.

    `adapter_config.json` has them where no `task_type` is given. PEFT asks the `PeftModel` for the class; there is no
    seam to answer in its stead but that method itself, on the one object that is saved.
    """

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        base = type(base_of(model))
        official = getattr(base, "native_class", None) or getattr(native, base.__name__, None)
        is_ours = base.__module__.split(".")[0] == __name__.split(".")[0]
        if official is not None and is_ours and hasattr(model, "_get_base_model_class"):
            # It holds no more than a class, so that copies of the model stay right
            model._get_base_model_class = partial(_official_class, official)
        return super()._get_adapter_state_dict(model, *args, **kwargs)  # type: ignore[misc]


def _names_mtp(config: PeftConfig, model: nn.Module) -> bool:
    """Whether layers of multi-token prediction are to be adapted: their full names are given."""
    names: list[str] = []
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        given = getattr(config, field, None)
        names += [] if given is None or isinstance(given, str) else given
    return any(is_mtp(in_model(name, model)) for name in names)


@contextlib.contextmanager
def without_mtp(model: nn.Module, config: PeftConfig) -> Iterator[None]:
    """Within the block, a model of this package has no MTP layers, as native has none; unless a config names them.

    PEFT goes by the ends of names, and freezes what it does not adapt. So MTP layers come out of the block frozen when
    the model had no adapter before.
    """
    decoder = next((module for module in model.modules() if isinstance(module, DeepseekV3Model)), None)
    layers = None if decoder is None else decoder._modules.get("mtp")
    if decoder is None or layers is None or _names_mtp(config, model):
        yield
        return
    is_first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    del decoder._modules["mtp"]
    # Some make a small model of the same config
    number, decoder.config.num_nextn_predict_layers = decoder.config.num_nextn_predict_layers, 0
    try:
        yield
        if is_first:
            layers.requires_grad_(False)
    finally:
        decoder._modules["mtp"], decoder.config.num_nextn_predict_layers = layers, number


def refuse_quantized_copies(config: PeftConfig, model: nn.Module) -> None:
    """
    Raises:
        ValueError: `modules_to_save` names modules of quantised weights, of which PEFT would train a copy.
    """
    wanted = getattr(config, "modules_to_save", None) or []
    for name, module in model.named_modules():
        named = any(name == end or name.endswith(f".{end}") for end in wanted)
        if named and any(not p.is_floating_point() for p in module.parameters()):
            raise ValueError(
                f"modules_to_save: {name} holds quantised weights, of which no copy can be trained. Adapt it by "
                "target_modules, or load with `quantization_config=PackedWeightsConfig(dequantize=True)`."
            )


class BesideMtp:
    """Tuners of which MTP layers are hidden while they look for what to adapt."""

    peft_config: dict[str, PeftConfig]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        with without_mtp(model, config):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)  # type: ignore[call-arg]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_quantized_copies(self.peft_config[adapter_name], model)
        with without_mtp(model, self.peft_config[adapter_name]):
            super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
