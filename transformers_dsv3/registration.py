"""Puts the plugin's classes behind Transformers' Auto classes for `deepseek_v3`, and takes them away again."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DeepseekV3Config,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_peft_available

from .compression.quantizer_fp8 import register_fp8
from .kernels import experts_auto, experts_grouped, experts_liger
from .models.dsv3 import (
    Dsv3Config,
    Dsv3ForCausalLM,
    Dsv3ForSequenceClassification,
    Dsv3ForTokenClassification,
    Dsv3Model,
)
from .models.dsv3.checkpoint_conversion_dsv3 import deepseek_v3_conversion_mapping


MODEL_TYPE = "deepseek_v3"
NATIVE_CONVERSION = get_checkpoint_conversion_mapping(MODEL_TYPE)
AUTO_CLASSES = {
    AutoModel: Dsv3Model,
    AutoModelForCausalLM: Dsv3ForCausalLM,
    AutoModelForSequenceClassification: Dsv3ForSequenceClassification,
    AutoModelForTokenClassification: Dsv3ForTokenClassification,
}


def register() -> None:
    """Makes the Auto classes load every `deepseek_v3` checkpoint into the plugin's classes. Done on import.

    Uses Transformers' registries only, so libraries that go by the model type (PEFT, GGUF readers, weight conversion)
    find what they know.
    """
    AutoConfig.register(MODEL_TYPE, Dsv3Config, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(Dsv3Config, model_class, exist_ok=True)
    # Transformers fuses per-expert weights for classes outside its own package only where that was asked for
    register_checkpoint_conversion_mapping(MODEL_TYPE, deepseek_v3_conversion_mapping(), overwrite=True)
    register_fp8()
    experts_grouped.register()
    experts_auto.register()
    experts_liger.register()
    if is_peft_available():
        from .training import lora_tuner

        lora_tuner.register()


def unregister() -> None:
    """Gives `deepseek_v3` back to Transformers' native classes. Models already made keep working."""
    AutoConfig.register(MODEL_TYPE, DeepseekV3Config, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, NATIVE_CONVERSION, overwrite=True)
    if is_peft_available():
        from .training import lora_tuner

        lora_tuner.unregister()


def is_registered() -> bool:
    """Whether the Auto classes load `deepseek_v3` checkpoints into the plugin's classes."""
    return CONFIG_MAPPING[MODEL_TYPE] is Dsv3Config
