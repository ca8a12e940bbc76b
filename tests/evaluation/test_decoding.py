import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from transformers_dsv3.evaluation.decoding import cache_bytes, cache_bytes_per_token, greedy_decode


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


def test_greedy_decode_takes_the_arg_max():
    model = small_llama()
    prompt = torch.arange(6)[None]
    speed, output = greedy_decode(model, prompt, 5, repeats=1)
    ids = prompt
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert speed > 0
    assert torch.equal(output.sequences, ids)
