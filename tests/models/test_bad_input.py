"""Every input that cannot be served is refused before compute, with the name of what is wrong."""

import pytest
import torch
from transformers import LlamaConfig

import transformers_dsv3


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(max_position_embeddings=64, pad_token_id=0)


@pytest.fixture
def no_compute(model, monkeypatch):
    """Fails the test when a layer runs."""

    def ran(*args, **kwargs):
        raise AssertionError("compute began")

    monkeypatch.setattr(model.model.layers[0], "forward", ran)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        ([[1, 96]], None, r"token id 96, outside the vocabulary of 96 tokens"),
        ([[1, -1]], None, r"token id -1, outside the vocabulary"),
        ([[]], None, r"`input_ids` of shape \(1, 0\) is empty"),
        ([[1, 2], [3, 4]], [[0, 1]], r"`attention_mask` of shape \(1, 2\) does not fit `input_ids` of 2 rows"),
    ],
)
def test_bad_tokens_and_masks(model, no_compute, call, tokens, mask, message):
    tokens = torch.tensor(tokens, dtype=torch.long)
    mask = torch.tensor(mask) if mask is not None else None
    with pytest.raises(ValueError, match=message):
        (model.generate if call == "generate" else model)(tokens, attention_mask=mask)


def test_packed_sequences_may_be_longer_together(model):
    positions = torch.arange(60).repeat(3)[None]
    assert model(torch.ones(1, 180, dtype=torch.long), position_ids=positions).logits.shape == (1, 180, 96)


def test_neither_or_both_inputs(model, no_compute):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.ones(1, 2, 32))


def test_unknown_backends(model):
    with pytest.raises((ValueError, KeyError), match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    with pytest.raises((ValueError, KeyError), match="no_such_experts"):
        model.set_experts_implementation("no_such_experts")


def test_use_mtp_where_it_cannot_work(model, make_model, no_compute):
    tokens = torch.ones(1, 4, dtype=torch.long)
    settings = {"use_mtp": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="this model has none"):
        make_model(num_nextn_predict_layers=0).generate(tokens, **settings)
    with pytest.raises(ValueError, match="needs a cache"):
        model.generate(tokens, use_cache=False, **settings)
    with pytest.raises(ValueError, match="static cache"):
        model.generate(tokens, cache_implementation="static", **settings)
    with pytest.raises(ValueError, match="`assistant_model` both draft"):
        model.generate(tokens, assistant_model=model, **settings)
    with pytest.raises(ValueError, match="leave beams"):
        model.generate(tokens, num_beams=2, **settings)
    with pytest.raises(ValueError, match="leave beams"):
        model.generate(tokens, prompt_lookup_num_tokens=2, **settings)
    with pytest.raises(ValueError, match="`guidance_scale`"):
        model.generate(tokens, guidance_scale=1.5, **settings)
    with pytest.raises(ValueError, match="attentions or hidden states"):
        model.generate(tokens, return_dict_in_generate=True, output_hidden_states=True, **settings)


def test_lost_precision_of_the_correction_bias(make_model):
    model = make_model()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = gate.e_score_correction_bias.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="its fp32 values are lost"):
        model(torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 3), (0, 4)])
def test_masks_of_another_shape(model, no_compute, shape):
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`attention_mask` of shape .* does not fit `input_ids` of 1 rows and 4"):
        model(tokens, attention_mask=torch.ones(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`attention_mask` of shape .* does not fit `input_ids` of 1 rows and 4"):
        model.generate(tokens, attention_mask=torch.ones(shape, dtype=torch.long), max_new_tokens=2)


def test_configurations_that_do_not_fit(tiny_config):
    with pytest.raises(ValueError, match="needs a transformers_dsv3.DeepseekV3Config, not a transformers.models"):
        transformers_dsv3.Dsv3ForCausalLM(LlamaConfig())
    config = tiny_config()
    config.n_group = 3
    with pytest.raises(ValueError, match=r"`n_routed_experts=8`: must be divisible by n_group \(3\)"):
        transformers_dsv3.Dsv3ForCausalLM(config)
    with pytest.raises(ValueError, match="`pad_token_id=96`: must lie within the vocabulary"):
        tiny_config(pad_token_id=96)
