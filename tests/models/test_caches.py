"""Caches hold latents, and everything that Transformers does with a cache works on them."""

import importlib.util

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers import cache_utils as transformers_caches


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model(make_model):
    return make_model()


def prompt(batch=2, length=10, seed=0):
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(ours, reference, tolerance=1e-5):
    assert ours.shape == reference.shape
    assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_lora_rank, rope", [(16, 8), (40, 4)])
def test_bytes_a_token(dtype, kv_lora_rank, rope, make_model):
    """layers × (kv_lora_rank + rotary dim) × item size, after prefill and decoding; MTP layers take no part."""
    model = make_model(
        kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope, num_hidden_layers=3, num_nextn_predict_layers=2
    ).to(dtype)
    with torch.no_grad():
        cache = model(prompt(batch=2, length=11), use_cache=True).past_key_values
        model(prompt(batch=2, length=1), past_key_values=cache)
    stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    measured = sum(tensor.nbytes for tensor in stored)
    assert cache.get_seq_length() == 12
    assert measured / (2 * 12) == 3 * (kv_lora_rank + rope) * dtype.itemsize


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_static_cache_equals_dynamic(implementation, masked, make_model):
    """Prefill and decoding with room left over, with padding on the left or no mask at all; prompts of one token."""
    model = make_model(attn_implementation=implementation)
    for length in (1, 9):
        tokens = prompt(length=length + 4)
        mask = torch.ones_like(tokens)
        if masked and length > 1:
            mask[1, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        results = []
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
            logits, start = [], 0
            with torch.no_grad():
                for size in (length, 1, 1, 2):
                    end = start + size
                    output = model(
                        tokens[:, start:end],
                        attention_mask=mask[:, :end] if masked else None,
                        position_ids=positions[:, start:end],
                        past_key_values=cache,
                    )
                    logits.append(output.logits[mask[:, start:end].bool()])
                    start = end
            results.append(torch.cat(logits))
        close(results[1], results[0])
        layer = cache.layers[0]
        assert layer.keys.shape == (2, 1, 24, 16) and layer.values.shape == (2, 1, 24, 8)


def test_static_cache_where_absorbing_pays_at_prefill(make_model):
    """A rank below half of N + V makes the absorbed path serve prefill too, which needs its own causal mask."""
    model = make_model(kv_lora_rank=8)
    tokens = prompt(length=12)
    assert model.model.layers[0].self_attn.is_absorbed_cheaper(12, 12)
    with torch.no_grad():
        expanded = model(tokens, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            close(model(tokens, past_key_values=cache).logits, expanded)


def test_generate_with_static_cache(model):
    expected = model.generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), cache_implementation="static", **GREEDY), expected)


BACKENDS = {
    "fp8": None if hasattr(transformers_caches, "Fp8QuantizedLayer") else "this Transformers has no fp8 cache",
    "quanto": None if importlib.util.find_spec("optimum") else "optimum-quanto is not installed",
    "hqq": None if importlib.util.find_spec("hqq") else "hqq is not installed",
}


@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why))) for name, why in BACKENDS.items()],
)
def test_quantized_cache(backend, make_model):
    """Latents of whole quantization groups, 64 values, and logits that stay near those of the exact cache."""
    model = make_model(kv_lora_rank=64, qk_rope_head_dim=64, initializer_range=0.05)
    options = {"backend": backend} if backend == "fp8" else {"backend": backend, "nbits": 4, "residual_length": 4}
    if backend == "hqq":
        options.update(axis_key=1, axis_value=1)
    tokens = prompt(length=40)
    exact, quantized = DynamicCache(config=model.config), QuantizedCache(config=model.config, **options)
    with torch.no_grad():
        for start, end in ((0, 20), *((i, i + 1) for i in range(20, 40))):
            logits = [model(tokens[:, start:end], past_key_values=cache).logits for cache in (exact, quantized)]
    assert quantized.get_seq_length() == 40
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.1
    keys, values = quantized.layers[0].update(torch.zeros(2, 1, 1, 64), torch.zeros(2, 1, 1, 64))
    assert keys.shape == values.shape == (2, 1, 41, 64)
    near = (keys[:, :, :40] - exact.layers[0].keys).norm() / exact.layers[0].keys.norm()
    assert 0 < near < 0.2

    text = model.generate(tokens, cache_implementation="quantized", cache_config=options, **GREEDY)
    assert text.shape == (2, 52)


def test_crop_takes_back_what_went_ahead(model):
    tokens = prompt(length=12)
    with torch.no_grad():
        straight = DynamicCache(config=model.config)
        model(tokens[:, :8], past_key_values=straight)
        expected = model(tokens[:, 8:], past_key_values=straight).logits
        cache = DynamicCache(config=model.config)
        model(torch.cat([tokens[:, :8], prompt(length=5, seed=9)], dim=1), past_key_values=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 8
        close(model(tokens[:, 8:], past_key_values=cache).logits, expected)


def test_reordered_cache_follows_its_rows(model):
    tokens = prompt(batch=3, length=8)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.reorder_cache(order)
        step = prompt(batch=3, length=1, seed=4)
        reordered = model(step, past_key_values=cache).logits
        whole = model(torch.cat([tokens[order], step], dim=1)).logits[:, -1:]
    close(reordered, whole)


@pytest.mark.parametrize("returned", [1, 3])
def test_beams_equal_native(returned, model, native_twin):
    """Beam search over uneven prompts: sequences and their scores."""
    tokens = prompt()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": returned, "output_scores": True}
    results = [
        m.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **settings)
        for m in (model, native_twin(model))
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    close(results[0].sequences_scores, results[1].sequences_scores)


def test_assistant_drafts(model, tiny_config, make_model):
    """A smaller model drafts; the text is the model's own."""
    assistant = make_model(seed=3, num_hidden_layers=1, hidden_size=16, num_nextn_predict_layers=0)
    tokens = prompt(batch=1)
    expected = model.generate(tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, assistant_model=assistant, **GREEDY), expected)
    # A copy of the model itself is right each time, so that drafts are kept too
    assert torch.equal(model.generate(tokens, assistant_model=make_model(), **GREEDY), expected)


def test_prompt_lookup(trained_model, training_bytes):
    """Drafts from the prompt's own repetitions, some right and some wrong."""
    text = training_bytes[None, 100:140]
    tokens = torch.cat([text, text[:, :25]], dim=1)
    passes = []
    trained_model.model.register_forward_hook(lambda *_: passes.append(1))
    settings = {"max_new_tokens": 30, "do_sample": False}
    expected = trained_model.generate(tokens, **settings)
    plain = len(passes)
    drafted = trained_model.generate(tokens, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(drafted, expected)
    assert len(passes) - plain < plain


@pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="Transformers offloads caches from an accelerator to the CPU"
)
def test_offloaded_cache(model):
    device = torch.accelerator.current_accelerator()
    model.to(device)
    tokens = prompt().to(device)
    expected = model.generate(tokens, **GREEDY)
    for implementation in ("offloaded", "offloaded_static"):
        assert torch.equal(model.generate(tokens, cache_implementation=implementation, **GREEDY), expected)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=lambda name: name
)
def test_compiled_decoding_without_graph_breaks(backend, make_model):
    """`fullgraph` on a static cache; one graph serves every step."""
    torch._dynamo.reset()
    model = make_model()
    model.set_experts_implementation("grouped_mm")
    tokens = prompt(length=12)
    graphs = []

    def count(graph, inputs):
        graphs.append(1)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    step = torch.compile(model.forward, fullgraph=True, backend=count, dynamic=False)
    with torch.no_grad():
        expected = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens[:, :7], past_key_values=cache)
        for position in range(7, 12):
            output = step(
                tokens[:, position : position + 1],
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
            )
            close(output.logits, expected[:, position : position + 1])
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_cache_made_by_native_is_understood(model, native_twin):
    """Both keep latents as keys and rotated shared keys as values, so a cache can be handed over."""
    tokens = prompt(length=9)
    native = native_twin(model)
    with torch.no_grad():
        expected = native(tokens).logits[:, -1:]
        cache = native(tokens[:, :-1], use_cache=True).past_key_values
        close(model(tokens[:, -1:], past_key_values=cache).logits, expected)
