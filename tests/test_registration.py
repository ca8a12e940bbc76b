"""Registration over `deepseek_v3`: on by import, given back on request."""

import textwrap

import pytest
import torch
import transformers
from transformers import AutoConfig, DeepseekV3Config

import transformers_dsv3
from tests import programs


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
        before = type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__.split(".")[0]
        import transformers_dsv3
        print(before, type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__.split(".")[0])
        """
    )
    run = programs.run(["-c", code, saved])
    assert run.stdout.split() == ["transformers", "transformers_dsv3"], run.stderr


def test_weights_cross_both_ways(make_model, saved, tmp_path):
    """The plugin's checkpoint in native, saved again by it, and that in the plugin: the same tensors throughout."""
    main = {name: tensor for name, tensor in make_model().state_dict().items() if ".mtp." not in name}

    def assert_same(model):
        state = model.state_dict()
        assert state.keys() == main.keys()
        assert all(torch.equal(tensor, main[name]) for name, tensor in state.items())

    try:
        transformers_dsv3.unregister()
        native = transformers.AutoModelForCausalLM.from_pretrained(saved)
        assert type(native) is transformers.DeepseekV3ForCausalLM
        assert_same(native)
        native.save_pretrained(tmp_path / "native")
    finally:
        transformers_dsv3.register()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(back) is transformers_dsv3.Dsv3ForCausalLM
    # Native drops the MTP layers and goes on announcing them
    assert back.config.num_nextn_predict_layers == 0
    assert_same(back)


def test_models_made_before_keep_working(make_model, tmp_path):
    model = make_model()
    tokens = torch.randint(1, 96, (1, 6))
    try:
        with torch.no_grad():
            before = model(tokens).logits
            text = model.generate(tokens, max_new_tokens=3, use_mtp=True)
            transformers_dsv3.unregister()
            assert torch.equal(model(tokens).logits, before)
            assert torch.equal(model.generate(tokens, max_new_tokens=3, use_mtp=True), text)
            model.save_pretrained(tmp_path)
            # The class itself still reads what it wrote
            loaded = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(loaded(tokens).logits, before)
    finally:
        transformers_dsv3.register()


def test_native_configs_are_served_by_native_models(tiny_config):
    fields = {key: value for key, value in tiny_config().to_dict().items() if key != "architectures"}
    model = transformers.AutoModelForCausalLM.from_config(DeepseekV3Config(**fields))
    assert type(model) is transformers.DeepseekV3ForCausalLM


def test_unregister_gives_the_weight_conversion_back():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    def operations():
        return [
            type(step).__name__
            for rule in get_checkpoint_conversion_mapping("deepseek_v3")
            for step in rule.operations
        ]

    assert "MergeExperts" in operations()
    try:
        transformers_dsv3.unregister()
        assert operations() == ["MergeModulelist", "Concatenate", "MergeModulelist"]
    finally:
        transformers_dsv3.register()
    assert "MergeExperts" in operations()


def test_names_in_transformers_are_put_there_and_given_back():
    """Models and config alike: a program that makes one of the other would else mix the two packages' classes."""
    names = ("DeepseekV3Config", "DeepseekV3Model", "DeepseekV3ForCausalLM")
    own = [getattr(transformers, name) for name in names]
    try:
        transformers_dsv3.register(names=True)
        assert all(getattr(transformers, name) is getattr(transformers_dsv3, name) for name in names)
        transformers_dsv3.unregister()
        assert [getattr(transformers, name) for name in names] == own
    finally:
        transformers_dsv3.register()
    assert [getattr(transformers, name) for name in names] == own
