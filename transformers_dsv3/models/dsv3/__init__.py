"""DeepSeek-V3: configuration, attention, mixture of experts, multi-token prediction, models, checkpoints.

Classes bear the names of Transformers' own, by which libraries look for them. What that one does not have, and the
names that these classes had before, begin with `Dsv3`.
"""

from .configuration_dsv3 import DeepseekV3Config, KimiK2Config
from .modeling_dsv3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
)


Dsv3Config = DeepseekV3Config
Dsv3ForCausalLM = DeepseekV3ForCausalLM
Dsv3ForSequenceClassification = DeepseekV3ForSequenceClassification
Dsv3ForTokenClassification = DeepseekV3ForTokenClassification
Dsv3Model = DeepseekV3Model
Dsv3PreTrainedModel = DeepseekV3PreTrainedModel

__all__ = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "Dsv3Config",
    "Dsv3ForCausalLM",
    "Dsv3ForSequenceClassification",
    "Dsv3ForTokenClassification",
    "Dsv3Model",
    "Dsv3PreTrainedModel",
    "KimiK2Config",
]
