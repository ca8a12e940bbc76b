"""DeepSeek-V3: configuration, attention, mixture of experts, multi-token prediction, models, checkpoints."""

from .configuration_dsv3 import Dsv3Config
from .modeling_dsv3 import (
    Dsv3ForCausalLM,
    Dsv3ForSequenceClassification,
    Dsv3ForTokenClassification,
    Dsv3Model,
    Dsv3PreTrainedModel,
)


__all__ = [
    "Dsv3Config",
    "Dsv3ForCausalLM",
    "Dsv3ForSequenceClassification",
    "Dsv3ForTokenClassification",
    "Dsv3Model",
    "Dsv3PreTrainedModel",
]
