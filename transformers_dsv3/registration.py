"""Puts the plugin's classes behind Transformers' Auto classes for `deepseek_v3`, and takes them away again."""

import sys
from functools import partial
from importlib import import_module
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

from .compression.gguf.registration import register_gguf
from .compression.packed.quantizer import register_packed
from .compression.quantizer_fp8 import register_fp8
from .generation.registration import register_manager
from .imports import AfterImport
from .kernels import experts_auto
from .models.dsv3 import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    KimiK2Config,
)
from .models.dsv3.checkpoint_conversion_dsv3 import deepseek_v3_conversion_mapping
from .models.joined.configuration_kimi_vl import KimiVLConfig


MODEL_TYPE = "deepseek_v3"
# Transformers' modules of models that read pictures, and ours of the same
JOINED = {"internvl": "internvl", "kimi_k25": "kimi", "llava": "llava"}
# Ours of these that have a processor, and its class
PROCESSORS = {"internvl": "InternVLProcessor", "llava": "LlavaProcessor"}
_AUTO_PROCESSOR = "transformers.models.auto.processing_auto"
CONFIGS = (DeepseekV3Config, KimiK2Config)
NATIVE_CONVERSION = get_checkpoint_conversion_mapping(MODEL_TYPE)
AUTO_CLASSES = {
    AutoModel: DeepseekV3Model,
    AutoModelForCausalLM: DeepseekV3ForCausalLM,
    AutoModelForSequenceClassification: DeepseekV3ForSequenceClassification,
    AutoModelForTokenClassification: DeepseekV3ForTokenClassification,
}


def register(names: bool = False) -> None:
    """Makes the Auto classes load `deepseek_v3` and `kimi_k2` checkpoints into the plugin's classes. Done on import.

    Uses Transformers' registries only, so libraries that go by the model type (PEFT, GGUF readers, weight conversion)
    find what they know.

    Args:
        names: whether `transformers.DeepseekV3ForCausalLM` and its like are the plugin's classes too, for programs
            that look a class up by the name in `config.architectures`, as TRL does with a model given by its path.
            `transformers-dsv3 run` asks for it; an import does not, since the names are Transformers' own, and there
            is no registry of them.

    PEFT looks the plugin's tuners up in a table of its own, whose import takes longer than all of this. They are put
    there when PEFT is imported, and classes for pictures and text when such a config is.
    """
    _set_names(of_plugin=names)
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in AUTO_CLASSES.items():
            # The mapping's own method: `auto_class.register` asks for one config class a model
            auto_class._model_mapping.register(config_class, model_class, exist_ok=True)
        # Transformers fuses per-expert weights for classes outside its own package only where that was asked for
        register_checkpoint_conversion_mapping(
            config_class.model_type, deepseek_v3_conversion_mapping(), overwrite=True
        )
    AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
    register_fp8()
    register_packed()
    register_gguf()
    register_manager()
    experts_auto.register()
    for watcher in _WATCHERS:
        watcher.start()


def _joined_classes(ours: str) -> list[Any]:
    module = sys.modules.get(f"{__package__}.models.joined.{ours}")
    return [] if module is None else [getattr(module, name) for name in module.__all__]


def _register_joined(ours: str) -> None:
    """Has the plugin's classes open their configs. Done when they are there."""
    for model_class in _joined_classes(ours):
        _open_by(AutoModelForImageTextToText, model_class.config_class, model_class)
        text_alone = sys.modules[f"{__package__}.models.joined.modeling_joined"].text_alone
        _open_by(AutoModelForCausalLM, model_class.config_class, text_alone(model_class))
        # Of classes outside its own package Transformers reverts names of its own only where that was asked for
        model_type = model_class.config_class.model_type
        if (conversion := get_checkpoint_conversion_mapping(model_type)) is not None:
            register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)
    _register_processors()


def _register_processors() -> None:
    """Has `AutoProcessor` open files that name no class by ours. Done when it and the config's model are there."""
    auto = sys.modules.get(_AUTO_PROCESSOR)
    if not hasattr(auto, "AutoProcessor"):
        return
    for ours, name in PROCESSORS.items():
        for model_class in _joined_classes(ours):
            module = import_module(f"{__package__}.models.joined.processing_{ours}")
            auto.AutoProcessor.register(model_class.config_class, getattr(module, name), exist_ok=True)  # type: ignore[union-attr]


def _open_by(auto_class: Any, config_class: type, model_class: type) -> None:
    mapping = auto_class._model_mapping
    mapping.register(config_class, model_class, exist_ok=True)
    if mapping.get(config_class, None) is not model_class:  # older releases register nothing for configs of their own
        mapping._extra_content[config_class] = model_class


def _import_joined(ours: str, unless_with: str = "") -> None:
    """Imports the plugin's class beside native's, so that importing the plugin alone brings neither."""
    spec = getattr(sys.modules.get(unless_with), "__spec__", None)
    if not getattr(spec, "_initializing", False):  # a model that imports its config comes here itself later
        import_module(f"{__package__}.models.joined.{ours}")


def _set_names(of_plugin: bool) -> None:
    """Puts the plugin's classes under native's names in `transformers`, or native's."""
    for model_class in AUTO_CLASSES.values():
        name = model_class.__name__
        setattr(transformers, name, model_class if of_plugin else getattr(modeling_deepseek_v3, name))
    transformers.DeepseekV3Config = DeepseekV3Config if of_plugin else configuration_deepseek_v3.DeepseekV3Config


def _register_tuners() -> None:
    from .training import peft_tuners

    peft_tuners.register()


_WATCHERS = [AfterImport("peft", _register_tuners), AfterImport(_AUTO_PROCESSOR, _register_processors)]
for _theirs, _ours in JOINED.items():
    _native = f"transformers.models.{_theirs}.{{}}_{_theirs}".format
    _WATCHERS += [
        AfterImport(f"{__package__}.models.joined.{_ours}", partial(_register_joined, _ours)),
        AfterImport(_native("modeling"), partial(_import_joined, _ours)),
        AfterImport(_native("configuration"), partial(_import_joined, _ours, _native("modeling"))),
    ]


def unregister() -> None:
    """Gives `deepseek_v3` back to Transformers' native classes. Models already made keep working."""
    _set_names(of_plugin=False)
    AutoConfig.register(MODEL_TYPE, configuration_deepseek_v3.DeepseekV3Config, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, NATIVE_CONVERSION, overwrite=True)
    for watcher in _WATCHERS:
        watcher.stop()
    for ours in JOINED.values():
        for model_class in _joined_classes(ours):
            _open_by(AutoModelForImageTextToText, model_class.native_class.config_class, model_class.native_class)
            AutoModelForCausalLM._model_mapping._extra_content.pop(model_class.config_class, None)
            if (auto := sys.modules.get(_AUTO_PROCESSOR)) is not None:
                auto.PROCESSOR_MAPPING._extra_content.pop(model_class.config_class, None)
    if (peft_tuners := sys.modules.get(f"{__package__}.training.peft_tuners")) is not None:
        peft_tuners.unregister()


def is_registered() -> bool:
    """Whether the Auto classes load `deepseek_v3` checkpoints into the plugin's classes."""
    return CONFIG_MAPPING[MODEL_TYPE] is DeepseekV3Config
