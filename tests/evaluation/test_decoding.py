import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from transformers_dsv3.evaluation.decoding import (
    cache_bytes,
    cache_bytes_per_token,
    decode,
    greedy_tokens_per_second,
)


def small_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
        )
    )


def test_cache_bytes_of_a_known_model():
    # Keys and values of 2 heads of 8, 4 bytes each, in 3 layers.
    assert cache_bytes_per_token(small_llama(), torch.arange(20)[None]) == 3 * 2 * 2 * 8 * 4


def test_storage_held_twice_counts_once():
    cache = DynamicCache()
    keys = torch.zeros(1, 1, 4, 8)
    cache.update(keys, keys, 0)
    cache.layers[0].keys = cache.layers[0].values
    assert cache_bytes(cache) == 4 * 8 * 4


def test_decode_takes_the_arg_max_whatever_the_generation_config_says():
    model = small_llama()
    model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.5, max_new_tokens=2)
    prompts = torch.arange(12).view(2, 6)
    ids = prompts
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(decode(model, prompts, 5, do_sample=False).sequences, ids)


def test_sampling_is_from_the_models_own_distribution():
    model = small_llama()
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1)
    torch.manual_seed(0)
    drawn = decode(model, torch.zeros(400, 3, dtype=torch.int64), 1, do_sample=True).sequences[:, 3]
    # Untrained, it is close to uniform over 50 tokens: nearly all of them turn up in 400 draws.
    assert drawn.unique().numel() > 40


def test_tokens_per_second_leaves_the_warm_up_out(monkeypatch):
    model = small_llama()
    clock = iter([0.0, 100.0, 101.0, 200.0, 201.0])

    def generate(**options):
        lengths.append(options["input_ids"].shape)

    lengths = []
    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert greedy_tokens_per_second(model, torch.arange(12).view(2, 6), 5) == 2 * 5 / 2.0
    assert lengths == [(1, 6)] * 3
