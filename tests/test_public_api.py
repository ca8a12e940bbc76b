"""The names that users rely on, each with a docstring of this package's own."""

import inspect
import re

import pytest

import transformers_dsv3


NAMES = [
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


def test_names():
    assert transformers_dsv3.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name):
    thing = getattr(transformers_dsv3, name)
    assert thing.__doc__ and thing.__doc__.strip()
    # Not one that Python or a base class made up for it
    assert not thing.__doc__.startswith(f"{name}(")
    assert all(thing.__doc__ != base.__doc__ for base in getattr(thing, "__mro__", ())[1:])
    assert inspect.getmodule(thing).__name__.startswith("transformers_dsv3.")


def test_classes_are_found_by_transformers_naming():
    models = [name for name in NAMES if name.startswith(("Dsv3", "DeepseekV3")) and not name.endswith("Config")]
    assert len(models) == 10
    for name in models:
        assert getattr(transformers_dsv3, name).config_class is transformers_dsv3.Dsv3Config


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_errors_are_described(name):
    thing = getattr(transformers_dsv3, name)
    text = inspect.getdoc(thing)
    own = thing if inspect.isfunction(thing) else vars(thing).get("__init__", lambda: None)
    parameters = [parameter for parameter in inspect.signature(own).parameters if parameter not in ("self", "config")]
    if not name.startswith(("Dsv3", "DeepseekV3", "KimiK2")):
        assert not parameters or ("Args:" in text or "Attributes:" in text)
        assert all(re.search(rf"\b{parameter}\b", text) for parameter in parameters)
        if parameters and name != "register":  # which raises nothing
            assert "Raises:" in text
    elif hasattr(thing, "forward") and "forward" in vars(thing):
        text = inspect.getdoc(thing.forward)
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "`(B, Q"))


def test_the_papers_are_named():
    assert "2412.19437" in transformers_dsv3.Dsv3Model.__doc__
    assert "2407.01906" in transformers_dsv3.train_selected_experts.__doc__
