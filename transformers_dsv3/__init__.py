"""DeepSeek-V3 for Hugging Face Transformers: importing this package registers it over `deepseek_v3`."""

from importlib import import_module
from typing import Any

from .models.dsv3 import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    Dsv3Config,
    Dsv3ForCausalLM,
    Dsv3ForSequenceClassification,
    Dsv3ForTokenClassification,
    Dsv3Model,
    Dsv3PreTrainedModel,
    KimiK2Config,
)
from .registration import is_registered, register, unregister


__version__ = "0.1.0"
__all__ = [
    "CompressionSettings",
    "CpuParallelismConfig",
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
    "ESFTCallback",
    "ExpertSelection",
    "InternVLProcessor",
    "KimiK2Config",
    "LoadBalancingCallback",
    "MtpObjectiveCallback",
    "PackedWeightsConfig",
    "PipelineArguments",
    "PipelineTrainer",
    "QkClipCallback",
    "compress",
    "distribute",
    "expert_importance",
    "explain",
    "export_gguf",
    "export_per_expert",
    "heal",
    "is_registered",
    "join",
    "lora_config",
    "mix",
    "model_card",
    "muon",
    "prune_experts",
    "pull_from_hub",
    "push_to_hub",
    "quantize",
    "quantize_int8",
    "register",
    "routing_report",
    "score_experts",
    "train_selected_experts",
    "unregister",
]


# Only who trains, shares or asks needs them, and the modules behind them
_LATE = {
    "CompressionSettings": ".compression.settings",
    "CpuParallelismConfig": ".training.parallel",
    "ESFTCallback": ".training.esft",
    "ExpertSelection": ".training.esft",
    "InternVLProcessor": ".models.joined.processing_internvl",
    "LoadBalancingCallback": ".training.load_balancing",
    "MtpObjectiveCallback": ".training.mtp_objective",
    "PackedWeightsConfig": ".compression.packed.quantizer",
    "PipelineArguments": ".training.pipeline.arguments",
    "PipelineTrainer": ".training.pipeline.trainer",
    "QkClipCallback": ".training.qk_clip",
    "compress": ".compression.compress",
    "distribute": ".training.parallel",
    "expert_importance": ".compression.expert_pruning",
    "explain": ".kernels.explain",
    "export_gguf": ".compression.gguf.export",
    "export_per_expert": ".training.lora_export",
    "heal": ".training.healing",
    "join": ".models.joined.join",
    "lora_config": ".training.lora",
    "mix": ".data.mixture",
    "model_card": ".hub.model_card",
    "muon": ".training.muon",
    "prune_experts": ".compression.expert_pruning",
    "pull_from_hub": ".hub.pull",
    "push_to_hub": ".hub.push",
    "quantize": ".compression.quantize",
    "quantize_int8": ".compression.quantize",
    "routing_report": ".evaluation.routing",
    "score_experts": ".training.esft",
    "train_selected_experts": ".training.esft",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
