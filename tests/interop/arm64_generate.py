"""Loads a checkpoint, compresses it to 4 bits and writes text: one program for this machine and for an emulated ARM.

Run by `arm64.sh`, with `make CHECKPOINT`, then `run CHECKPOINT RESULT.json` on both, then `compare RESULT RESULT`.
"""

import ctypes
import json
import platform
import sys
import time


def make(checkpoint):
    """A small model that has learned to count, so that its greedy text is no toss-up."""
    import torch

    import transformers_dsv3

    torch.manual_seed(0)
    config = transformers_dsv3.Dsv3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        num_nextn_predict_layers=1,
        max_position_embeddings=256,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers_dsv3.Dsv3ForCausalLM._from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        first, stride = torch.randint(64, (8, 1)), torch.randint(1, 4, (8, 1))
        tokens = (first + stride * torch.arange(32)) % 64
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5, f"the model did not learn to count: loss {loss:.2f}"
    model.save_pretrained(checkpoint)


def run(checkpoint, result):
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_dsv3
    from transformers_dsv3.kernels.cpu import library, step

    steps, run_step = [], step.Program.run
    step.Program.run = lambda self, *arguments: steps.append(1) or run_step(self, *arguments)
    found = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "instruction set": library.instruction_set(),
        "threads": torch.get_num_threads(),
        "shares torch's threads": hasattr(ctypes.CDLL(None), "GOMP_parallel"),
    }
    prompt = torch.tensor([[3, 5, 7, 9, 11, 13, 15, 17]])
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        transformers_dsv3.quantize(model, bits=4, activations="8")
        del steps[:]
        began = time.perf_counter()
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            logits = model(text).logits[0].tolist()
        found[str(dtype)] = {"text": text[0].tolist(), "steps": len(steps), "seconds": seconds, "logits": logits}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


def compare(*results):
    here, there = (json.load(open(result, encoding="utf-8")) for result in results)
    for found in (here, there):
        print({name: value for name, value in found.items() if not isinstance(value, dict)})
    for dtype, tolerance in (("torch.float32", 0.02), ("torch.bfloat16", 0.2)):
        ours, theirs = here[dtype], there[dtype]
        pairs = [pair for rows in zip(ours["logits"], theirs["logits"]) for pair in zip(*rows)]
        worst, largest = max(abs(a - b) for a, b in pairs), max(abs(a) for a, _ in pairs)
        print(f"{dtype}: {theirs['text']}, {theirs['steps']} steps of one call, {theirs['seconds']:.1f} s")
        print(f"    same text here: {ours['text'] == theirs['text']}; logits differ by {worst:.2g} of {largest:.2g}")
        assert ours["text"] == theirs["text"] and theirs["steps"] == 23 and worst < tolerance


{"make": make, "run": run, "compare": compare}[sys.argv[1]](*sys.argv[2:])
