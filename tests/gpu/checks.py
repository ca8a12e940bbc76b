"""What has to hold on a GPU, checked by small models without pytest; on a CPU the same as far as it goes there.

python tests/gpu/checks.py --device cuda --json checks.json
"""

import argparse
import copy
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import DeepseekV3ForCausalLM, GenerationConfig

import transformers_dsv3
from transformers_dsv3.benchmark.contenders import share_weights


# Experts, latents and heads as wide as the programs' tiles, of few layers
ON_A_GPU = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # 0.02 makes activations so small that errors drown, and best tokens so close
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ON_A_CPU = {
    **ON_A_GPU,
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
NEW_TOKENS = 24


class NotHere(Exception):
    """Why a check has nothing to look at on a device."""


def make_model(device: torch.device, dtype: torch.dtype = torch.float32) -> transformers_dsv3.Dsv3ForCausalLM:
    torch.manual_seed(0)
    config = transformers_dsv3.Dsv3Config(**(ON_A_GPU if device.type == "cuda" else ON_A_CPU))
    with device:
        model = transformers_dsv3.Dsv3ForCausalLM._from_config(config, dtype=dtype).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and never ending early
    return model


def prompt(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options
    )


def logits_equal_natives(device: torch.device) -> dict[str, str]:
    """In fp32 as native Transformers', and in bf16 no further from them than native's own."""
    model = make_model(device)
    ids = prompt(model, 2, 65)
    with torch.no_grad():
        native = share_weights(copy.deepcopy(model).double(), DeepseekV3ForCausalLM)
        native.set_experts_implementation("eager")  # the only one for float64
        exact = native(ids).logits
        figures = {}
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, None)):
            ours = copy.deepcopy(model).to(dtype)
            errors = [relative_error(m(ids).logits, exact) for m in (ours, share_weights(ours, DeepseekV3ForCausalLM))]
            name = str(dtype).removeprefix("torch.")
            figures[f"{name}, error beside float64"] = f"{errors[0]:.2e}"
            figures[f"{name}, native's"] = f"{errors[1]:.2e}"
            assert errors[0] <= (bound if bound is not None else 1.5 * errors[1]), figures
    return figures


def decoding_equals_prefill(device: torch.device) -> dict[str, str]:
    """Logits of tokens that come one by one over a cache as those of a pass over all, in fp32."""
    model = make_model(device)
    ids = prompt(model, 2, 40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = model(ids[:, :32]).past_key_values, []
        for place in range(32, 40):
            steps.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    error = relative_error(torch.cat(steps, 1), whole[:, 32:])
    assert error <= 2e-5, error
    return {"error": f"{error:.2e}"}


def static_decoding_writes_the_same(device: torch.device) -> dict[str, str]:
    """`cache_implementation="static"`, on a GPU compiled into graphs, writes what a growing cache writes."""
    model = make_model(device)
    seconds = []
    for batch in (1, 3):
        ids = prompt(model, batch, 17)
        expected = generate(model, ids)
        started = time.perf_counter()
        written = generate(model, ids, cache_implementation="static")
        seconds.append(time.perf_counter() - started)
        assert torch.equal(written, expected), f"batch {batch}: {(written != expected).sum().item()} tokens differ"
    return {"seconds of the first": f"{seconds[0]:.1f}"}


def static_decoding_compiles_once(device: torch.device) -> dict[str, str]:
    """Prompts of other lengths, over a cache of one length, are decoded by what was compiled for the first."""
    if device.type == "cpu":
        raise NotHere("Transformers compiles steps on GPUs only")
    model = make_model(device, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for seed, length in enumerate((40, 40, 33, 21)):
        ids = prompt(model, 1, length, seed)
        generate(model, ids, cache_implementation="static")
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and graphs == graphs[:1] * 4, f"graphs after each generate: {graphs}"
    return {"graphs": str(graphs[0])}


def a_token_is_one_launch(device: torch.device) -> dict[str, str]:
    """Of a CUDA graph; what generate() does around it is told, not judged."""
    if device.type == "cpu":
        raise NotHere("there are no CUDA graphs")
    model = make_model(device, torch.bfloat16)
    ids = prompt(model, 1, 32)
    for _ in range(3):
        generate(model, ids, cache_implementation="static")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        generate(model, ids, cache_implementation="static")
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    graphs = sum(count for name, count in calls.items() if name in ("cudaGraphLaunch", "hipGraphLaunch"))
    others = sum(
        count for name, count in calls.items() if name in ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel")
    )
    steps = NEW_TOKENS - 1  # the first token is the prompt's
    figures = {"graph launches a token": f"{graphs / steps:.2f}", "other launches a token": f"{others / steps:.1f}"}
    assert graphs == steps, figures
    return figures


def drafts_change_nothing(device: torch.device) -> dict[str, str]:
    """Greedy self-speculation with the MTP layer writes what plain decoding writes."""
    model = make_model(device)
    ids = prompt(model, 2, 17)
    output = generate(model, ids, use_mtp=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, generate(model, ids))
    return {"drafted": str(output.mtp_drafted_tokens), "accepted": str(output.mtp_accepted_tokens)}


def gradients_equal_the_plain_ones(device: torch.device) -> dict[str, str]:
    """Of a training step in fp32, as `auto` serves it and expert after expert; and twice the same bits."""
    grads = []
    for name in ("eager", "auto", "auto"):
        model = make_model(device).train()
        model.set_experts_implementation(name)
        ids = prompt(model, 2, 64)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    errors = {key: relative_error(grads[1][key], grad) for key, grad in grads[0].items() if grad.any()}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= 1e-4, f"{worst}: {errors[worst]:.1e}"
    experts = [key for key in grads[1] if ".experts." in key]
    assert experts and all(torch.equal(grads[1][key], grads[2][key]) for key in experts), "bits differ between runs"
    return {"largest error": f"{errors[worst]:.2e}", "of": worst}


def the_host_never_waits(device: torch.device) -> dict[str, str]:
    """For the GPU, in a layer's experts, forward and backward."""
    if device.type == "cpu":
        raise NotHere("there is nothing to wait for")
    model = make_model(device, torch.bfloat16)
    experts = model.model.layers[-1].mlp.experts
    tokens, chosen = 40, model.config.num_experts_per_tok
    hidden = torch.randn(tokens, model.config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, index = torch.rand(tokens, model.config.n_routed_experts, device=device).topk(chosen)

    def step() -> None:
        experts(hidden, index, weights).sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def backends_are_ours(device: torch.device) -> dict[str, str]:
    """`explain` has Triton's programs in use on a GPU, wherever it lists them."""
    text = transformers_dsv3.explain(make_model(device, torch.bfloat16))
    in_use: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            in_use[operation := line.partition(" (")[0]] = []
        elif line[2] == "*":
            in_use[operation].append(line[4:].split()[0])
        else:
            assert device.type == "cpu" or line[4:].split()[0] != "triton", text
    return {operation: " ".join(names) for operation, names in in_use.items()}


CHECKS: list[Callable[[torch.device], dict[str, str]]] = [
    backends_are_ours,
    logits_equal_natives,
    decoding_equals_prefill,
    gradients_equal_the_plain_ones,
    the_host_never_waits,
    drafts_change_nothing,
    static_decoding_writes_the_same,
    static_decoding_compiles_once,
    a_token_is_one_launch,
]


def run(check: Callable[[torch.device], dict[str, str]], device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        entry = {"outcome": "passed", "figures": check(device)}
    except NotHere as reason:
        entry = {"outcome": "not here", "reason": str(reason)}
    except Exception as error:  # one that fails is not the others
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0]
        entry = {"outcome": "failed", "reason": f"{type(error).__name__}: {line}"}
    return {**entry, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--json", type=Path, required=True, help="Written after every check.")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for check in CHECKS:
        results[check.__name__] = run(check, torch.device(options.device))
        print(check.__name__, results[check.__name__], flush=True)
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if any(each["outcome"] == "failed" for each in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
