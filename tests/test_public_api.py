"""The names that users rely on, each with a docstring of this package's own."""

import inspect

import pytest

import transformers_dsv3


NAMES = [
    "Dsv3Config",
    "Dsv3ForCausalLM",
    "Dsv3ForSequenceClassification",
    "Dsv3ForTokenClassification",
    "Dsv3Model",
    "Dsv3PreTrainedModel",
    "ESFTCallback",
    "ExpertSelection",
    "LoadBalancingCallback",
    "MtpObjectiveCallback",
    "explain",
    "is_registered",
    "lora_config",
    "pull_from_hub",
    "push_to_hub",
    "register",
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
    for name in NAMES[1:6]:
        assert getattr(transformers_dsv3, name).config_class is transformers_dsv3.Dsv3Config
