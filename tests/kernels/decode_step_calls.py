"""Prints how many calls of this package's Python functions one step of decoding makes, by a model of four layers.

    python tests/kernels/decode_step_calls.py

With the compiled CPU backend, batch 1, bf16, over a cache that grows; `--all` lists the functions.
"""

import argparse
import collections
import sys

import torch
from transformers import DynamicCache

import transformers_dsv3


def count() -> collections.Counter:
    """Calls by function, of a step after some that have decided which backends serve it."""
    config = transformers_dsv3.DeepseekV3Config(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=4,
        first_k_dense_replace=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=256, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, num_experts_per_tok=4,
        n_shared_experts=1, n_group=4, topk_group=2, num_nextn_predict_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers_dsv3.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    folder = transformers_dsv3.__path__[0]
    calls: collections.Counter = collections.Counter()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            calls[f"{code.co_filename[len(folder) + 1 :]}:{code.co_qualname}"] += 1

    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        cache = DynamicCache(config=config)
        model(torch.ones(1, 64, dtype=torch.long), past_key_values=cache)
        for _ in range(3):
            model(token, past_key_values=cache)
        sys.setprofile(note)
        try:
            model(token, past_key_values=cache)
        finally:
            sys.setprofile(None)
    return calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="list the functions")
    calls = count()
    if parser.parse_args().all:
        for name, number in calls.most_common():
            print(f"{number:5} {name}")
    print(calls.total())
