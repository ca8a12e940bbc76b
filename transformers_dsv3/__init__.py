"""DeepSeek-V3 for Hugging Face Transformers: importing this package registers it over `deepseek_v3`."""

from typing import Any

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
    "LoadBalancingCallback",
    "MtpObjectiveCallback",
    "explain",
    "is_registered",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    # Only who trains needs them, and the trainer's modules behind them
    if name == "LoadBalancingCallback":
        from .training.load_balancing import LoadBalancingCallback

        return LoadBalancingCallback
    if name == "MtpObjectiveCallback":
        from .training.mtp_objective import MtpObjectiveCallback

        return MtpObjectiveCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
