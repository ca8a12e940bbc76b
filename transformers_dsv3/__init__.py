"""DeepSeek-V3 for Hugging Face Transformers: importing this package registers it over `deepseek_v3`."""

from .kernels.registry import explain
from .models.dsv3 import (
    Dsv3Config,
    Dsv3ForCausalLM,
    Dsv3ForSequenceClassification,
    Dsv3ForTokenClassification,
    Dsv3Model,
    Dsv3PreTrainedModel,
)
from .registration import is_registered, register, unregister


__version__ = "0.1.0"
__all__ = [
    "Dsv3Config",
    "Dsv3ForCausalLM",
    "Dsv3ForSequenceClassification",
    "Dsv3ForTokenClassification",
    "Dsv3Model",
    "Dsv3PreTrainedModel",
    "explain",
    "is_registered",
    "register",
    "unregister",
]

register()
