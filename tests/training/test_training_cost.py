"""What balancing reaches and costs, and the memory of long sequences. Slow: run on a quiet machine."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState, TrainingArguments

import transformers_dsv3
from transformers_dsv3.training.quickstart_run import QuickstartSettings


pytestmark = pytest.mark.slow


def test_counting_and_balancing(measured):
    """Steps of the quickstart's model in turns: all that balancing adds, and none of it."""
    settings = QuickstartSettings()
    config = AutoConfig.for_model("deepseek_v3", vocab_size=settings.vocab_size, **settings.model)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, settings.vocab_size, (settings.batch_size, settings.block_length))
    routers = [module for module in model.modules() if type(module).__name__ == "Dsv3TopkRouter"]
    callback = transformers_dsv3.LoadBalancingCallback()
    state = TrainerState(global_step=0, max_steps=1000)
    arguments = TrainingArguments("unused", use_cpu=not torch.cuda.is_available(), report_to="none")
    callback.on_train_begin(arguments, state, None, model=model)
    count = type(routers[0]).count

    def step(balanced):
        # Where nothing is counted, the counter is replaced on the instances
        for router in routers:
            router.count = count.__get__(router) if balanced else lambda *arguments: None
        started = time.perf_counter()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        if balanced:
            callback.on_pre_optimizer_step(arguments, state, None, model=model)
        optimizer.step()
        if balanced:
            callback.on_optimizer_step(arguments, state, None, model=model)
        optimizer.zero_grad()
        return time.perf_counter() - started

    for _ in range(3):
        step(True), step(False)
    ratios = []
    for _ in range(40):
        with_it, without = step(True), step(False)
        again, before = step(False), step(True)
        ratios.append((with_it + before) / (without + again))
    overhead = statistics.median(ratios) - 1
    measured["time that counting and balancing add to a step of the quickstart's model, median"] = overhead
    assert overhead < 0.02


def test_balancing_without_arguments(tmp_path, measured):
    """`LoadBalancingCallback()`, 16 experts, 400 steps on the standard library's source."""
    study = Path(__file__).parents[2] / "examples" / "balancing_study.py"
    command = [sys.executable, str(study), "--study", "default", "--results", str(tmp_path / "study.json")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (result,) = json.loads((tmp_path / "study.json").read_text())
    measured["held-out utilisation after 400 steps of LoadBalancingCallback()"] = result["utilisation"]
    assert result["utilisation"] >= 0.8 and result["dead_experts"] == 0


LONG = """
import resource, sys, torch
import transformers_dsv3
from transformers_dsv3.models.dsv3 import objectives_dsv3
torch.manual_seed(0)
objectives_dsv3.LOGITS_BYTES = int(sys.argv[1])
config = transformers_dsv3.Dsv3Config(
    vocab_size=64000, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    num_nextn_predict_layers=0, max_position_embeddings=8192,
)
model = transformers_dsv3.Dsv3ForCausalLM(config).train()
tokens = torch.randint(0, 64000, (1, 4096), generator=torch.Generator().manual_seed(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = model(tokens, labels=tokens, use_cache=False).loss
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float(loss))
"""


def test_memory_of_long_sequences(measured):
    """4,096 positions of 64,000 logits: 1 GiB in fp32, and several times that with their gradients."""
    seen = {}
    for limit in (2**40, 2**26):
        result = subprocess.run([sys.executable, "-c", LONG, str(limit)], capture_output=True, text=True, check=True)
        kilobytes, loss = result.stdout.split()
        seen[limit] = int(kilobytes) / 2**20, float(loss)
    assert seen[2**26][1] == pytest.approx(seen[2**40][1], rel=1e-6)
    measured["memory of a step on 4,096 tokens of 64,000 logits, GiB, at once"] = seen[2**40][0]
    measured["memory of a step on 4,096 tokens of 64,000 logits, GiB, part by part"] = seen[2**26][0]
    assert seen[2**26][0] < 0.3 * seen[2**40][0]
