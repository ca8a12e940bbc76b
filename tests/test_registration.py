"""Registration over `deepseek_v3`: on by import, given back on request."""

import subprocess
import sys
import textwrap

import pytest
import transformers
from transformers import AutoConfig, DeepseekV3Config

import transformers_dsv3


@pytest.fixture
def saved(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


AUTO_CLASSES = [
    ("AutoModel", "Dsv3Model", "DeepseekV3Model"),
    ("AutoModelForCausalLM", "Dsv3ForCausalLM", "DeepseekV3ForCausalLM"),
    ("AutoModelForSequenceClassification", "Dsv3ForSequenceClassification", "DeepseekV3ForSequenceClassification"),
    ("AutoModelForTokenClassification", "Dsv3ForTokenClassification", "DeepseekV3ForTokenClassification"),
]


@pytest.mark.parametrize("auto_name, plugin_name, native_name", AUTO_CLASSES)
def test_auto_classes(saved, auto_name, plugin_name, native_name):
    auto = getattr(transformers, auto_name)
    assert type(auto.from_pretrained(saved)) is getattr(transformers_dsv3, plugin_name)
    try:
        transformers_dsv3.unregister()
        assert not transformers_dsv3.is_registered()
        assert type(AutoConfig.from_pretrained(saved)) is DeepseekV3Config
        assert type(auto.from_pretrained(saved)) is getattr(transformers, native_name)
    finally:
        transformers_dsv3.register()
    assert transformers_dsv3.is_registered()
    assert type(auto.from_pretrained(saved)) is getattr(transformers_dsv3, plugin_name)


def test_native_classes_stay_usable(saved):
    native = transformers.DeepseekV3ForCausalLM.from_pretrained(saved)
    assert type(native.config) is DeepseekV3Config


def test_registering_twice_changes_nothing():
    transformers_dsv3.register()
    transformers_dsv3.register()
    assert AutoConfig.for_model("deepseek_v3").__class__ is transformers_dsv3.Dsv3Config


def test_only_an_import_is_needed(saved):
    """In a process of its own: without the import native's class, with it the plugin's."""
    code = textwrap.dedent(
        """
        import sys
        from transformers import AutoModelForCausalLM
        before = type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__
        import transformers_dsv3
        print(before, type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
        """
    )
    run = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, timeout=240)
    assert run.stdout.split() == ["DeepseekV3ForCausalLM", "Dsv3ForCausalLM"], run.stderr
