"""What programs replace outside of a model: functions of PyTorch, classes' forwards, functions of caches, registries.

Attention kernels (SageAttention), DeepSpeed's ZeRO-3, counters of operations, Liger and scripts do so.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native_modeling
from transformers.utils import ModelOutput

from tests.models.test_as_native import SMALL, STEPS, TOKENS, assert_same, everything, pair  # noqa: F401
from transformers_dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM


def counted(owner, name, monkeypatch, change=lambda result: result):
    """Replaces an attribute by what counts its calls and changes its result; the list of calls."""
    calls, original = [], getattr(owner, name)

    def replacement(*args, **kwargs):
        calls.append(1)
        return change(original(*args, **kwargs))

    monkeypatch.setattr(owner, name, replacement)
    return calls


def run_both(pair, replace):  # noqa: F811
    """Both models with something replaced: they give the same, and what was replaced is called as often, if at all."""
    counts = []
    results = []
    for model in pair():
        with pytest.MonkeyPatch.context() as patch:
            calls = replace(model, patch)
            results.append(everything(model))
            counts.append(len(calls))
    for ours, native in zip(*[result[:2] for result in results]):
        torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-3)
    assert counts[0] == counts[1] > 0


FUNCTIONS = [(F, "linear"), (F, "scaled_dot_product_attention"), (F, "silu"), (nn.Module, "__call__")]


@pytest.mark.parametrize("owner, name", FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_functions_of_pytorch(pair, owner, name):  # noqa: F811
    def replace(model, patch):
        if owner is F:
            return counted(owner, name, patch, lambda result: result * 1.1)
        calls, original = [], nn.Module.__call__

        def call(module, *args, **kwargs):
            calls.append(1)
            result = original(module, *args, **kwargs)
            return result * 1.1 if type(module) is nn.Linear else result

        patch.setattr(nn.Module, "__call__", call)
        return calls

    run_both(pair, replace)


# By the name of a module; experts are computed by a function of Transformers' registry
@pytest.mark.parametrize(
    "name", ["model.norm", "model.layers.0.mlp", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts", "lm_head"]
)
def test_forwards_of_classes(pair, name):  # noqa: F811
    run_both(pair, lambda model, patch: counted(type(model.get_submodule(name)), "forward", patch, scaled))


@pytest.mark.parametrize(
    "name",
    ["MLP", "MoE", "RMSNorm", "Attention", "TopkRouter", "Experts", "DecoderLayer", "Model", "ForCausalLM"],
)
def test_forwards_of_natives_classes(pair, name):  # noqa: F811
    """By which scripts change `modeling_deepseek_v3`, for all its models."""
    run_both(
        pair, lambda model, patch: counted(getattr(native_modeling, f"DeepseekV3{name}"), "forward", patch, scaled)
    )


def scaled(output):
    if isinstance(output, tuple):
        return (output[0] * 1.1, *output[1:])
    for name in ("last_hidden_state", "logits"):
        if name in output if isinstance(output, ModelOutput) else False:
            output[name] = output[name] * 1.1
    return output if isinstance(output, ModelOutput) else output * 1.1


@pytest.mark.parametrize("where", ["the cache", "DynamicCache", "DynamicLayer"])
def test_caches_updates(pair, where):  # noqa: F811
    """Compression of keys and values, and what watches them, replaces `update`."""
    logits, counts = [], []
    for model in pair():
        model.eval()
        cache = DynamicCache(config=model.config)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            owner = {"the cache": cache, "DynamicCache": DynamicCache, "DynamicLayer": DynamicLayer}[where]
            calls = counted(owner, "update", patch)
            steps = [model(TOKENS[:, :-STEPS], past_key_values=cache).logits]
            steps += [model(TOKENS[:, -n:][:, :1], past_key_values=cache).logits for n in range(STEPS, 0, -1)]
        logits.append(torch.cat(steps, dim=1))
        counts.append(len(calls))
    assert counts[0] == counts[1] == (STEPS + 1) * model.config.num_hidden_layers
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_experts_under_the_default_name(pair):  # noqa: F811
    """Native's default is `grouped_mm`: whoever puts a function of their own there means all models."""

    def replace(model, patch):
        calls, original = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]

        def replacement(*args):
            calls.append(1)
            return 1.1 * original(*args)

        patch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", replacement)
        return calls

    run_both(pair, replace)


def test_values_reach_a_replaced_attention_as_they_are(pair):  # noqa: F811
    """Nothing pads the values' width, which PyTorch's own function would be faster with."""
    widths = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        widths.append(value.shape[-1])
        repeated = value.mean(dim=2, keepdim=True).expand(-1, -1, query.shape[2], -1)
        return repeated.transpose(1, 2).contiguous(), None

    for model in pair():
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
            model(TOKENS)
        assert set(widths) == {model.config.v_head_dim}


@pytest.mark.parametrize("given", ["position_bias", "softcap", "output_attentions", "scaling"])
@pytest.mark.parametrize("step", ["prefill", "decoding", "training"])
def test_keyword_arguments_of_attention(pair, given, step, caplog):  # noqa: F811
    """What Transformers' attention functions read of them acts, is warned of, or refused, as there."""
    seen = []
    for model in pair():
        model.train(step == "training")
        heads = model.config.num_attention_heads
        with torch.set_grad_enabled(step == "training"):
            cache = model(TOKENS[:, :-1]).past_key_values if step == "decoding" else None
            tokens = TOKENS[:, -1:] if step == "decoding" else TOKENS
            queries, keys = tokens.shape[1], TOKENS.shape[1]
            bias = torch.linspace(-2, 2, heads * queries * keys).view(1, heads, queries, keys)
            value = {"position_bias": bias, "softcap": 30.0, "output_attentions": True, "scaling": 1.0}[given]
            try:
                seen.append(model(tokens, past_key_values=cache, use_cache=cache is not None, **{given: value}).logits)
            except (ValueError, TypeError) as error:
                seen.append(type(error))
    if isinstance(seen[1], type):
        assert seen[0] is seen[1]
    else:
        torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-3)


def test_a_bias_on_kv_b_proj(pair):  # noqa: F811
    models = pair()
    for model in models:
        projection = model.model.layers[1].self_attn.kv_b_proj
        projection.bias = nn.Parameter(torch.linspace(-1, 1, projection.out_features))
    assert_same(*models)


def test_the_config_is_read_at_each_call(pair):  # noqa: F811
    models = pair()
    for model in models:
        model.config.rope_interleave = not model.config.rope_interleave
    assert_same(*models)


def test_norms_with_strides(pair):  # noqa: F811
    models = pair()
    for model in models:
        weight = torch.stack([model.model.norm.weight.detach() * 2] * 2, dim=1)
        model.model.norm.weight = nn.Parameter(weight[:, 0])
    assert_same(*models)


def test_gradients_in_batches(pair):  # noqa: F811
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` uses it."""
    gradients = []
    for model in pair():
        embeds = model.get_input_embeddings()(TOKENS[:1, :4]).detach().requires_grad_()
        output = model(inputs_embeds=embeds, use_cache=False).logits[0, -1, :3]
        gradients.append(torch.autograd.grad(output, embeds, torch.eye(3), is_grads_batched=True)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_seeds_give_natives_weights():
    models = []
    for model_class, config_class in (
        (DeepseekV3ForCausalLM, DeepseekV3Config),
        (native_modeling.DeepseekV3ForCausalLM, native_modeling.DeepseekV3Config),
    ):
        torch.manual_seed(0)
        models.append(model_class(config_class(**{**SMALL, "num_hidden_layers": 2})).state_dict())
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_the_class_takes_natives_config():
    config = native_modeling.DeepseekV3Config(**{**SMALL, "num_hidden_layers": 2})
    model = DeepseekV3ForCausalLM(config)
    assert type(model.config) is DeepseekV3Config and model.config.hidden_size == config.hidden_size
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, config.vocab_size)


@pytest.mark.parametrize("mode", ["one program", "first use in training"])
def test_the_first_use_may_be_compiled(mode):
    """In a thread that has run no model yet, as a script's first is."""
    import threading

    config = DeepseekV3Config(**{**SMALL, "num_hidden_layers": 2})
    model = DeepseekV3ForCausalLM(config).train(mode == "first use in training")
    lengths, problems = [], []

    def run():
        try:
            compiled = torch.compile(model, backend="eager", dynamic=False)
            for length in (12, 9):
                tokens = torch.ones(2, length, dtype=torch.long)
                lengths.append(compiled(tokens, labels=tokens, use_cache=False).logits.shape[1])
        except Exception as error:  # told below, in the test's own thread
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not problems and lengths == [12, 9]
