"""Engines that parse the source of a model's layers (vLLM, SGLang) are given native's, by the plugin's model class."""

import pytest
import torch
from transformers import AutoModel, DeepseekV3Config, DeepseekV3Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

import transformers_dsv3
from transformers_dsv3.models.dsv3.decoder_dsv3 import DeepseekV3DecoderLayer


@pytest.fixture
def register(monkeypatch):
    """Registers an attention function as an engine does; it is forgotten after the test."""

    def register_name(name):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, ALL_ATTENTION_FUNCTIONS["sdpa"])

    return register_name


def build(config, implementation, auto=AutoModel):
    config._attn_implementation = implementation
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("engine", ["vllm", "vllm_mla", "sglang"])
def test_engines_get_the_layers_whose_source_they_know(engine, register, tiny_config):
    register(engine)
    model = build(tiny_config(), engine)
    assert type(model) is transformers_dsv3.DeepseekV3Model
    assert all(type(layer) is native.DeepseekV3DecoderLayer for layer in model.layers)
    expected = DeepseekV3Model(DeepseekV3Config(**{**tiny_config().to_dict(), "architectures": None}))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}


@pytest.mark.parametrize("other", ["sdpa", "eager", "my_attention"])
def test_whoever_else_registers_attention_gets_the_plugins_layers(other, register, tiny_config):
    if other not in ("sdpa", "eager"):
        register(other)
    model = build(tiny_config(), other)
    assert all(type(layer) is DeepseekV3DecoderLayer for layer in model.layers)
    assert len(model.mtp_layers) == tiny_config().num_nextn_predict_layers


def test_such_a_model_computes_what_native_computes(register, make_model, native_twin):
    register("vllm")
    model = make_model(num_nextn_predict_layers=0, attn_implementation="vllm")
    tokens = torch.arange(24).view(2, 12)
    assert type(model.model.layers[0]) is native.DeepseekV3DecoderLayer
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, native_twin(model)(tokens).logits)
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
        expected = native_twin(model).generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, expected)
