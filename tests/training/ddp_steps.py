"""Two training steps of two processes: `torchrun --nproc_per_node 2 ddp_steps.py`. Started by test_ddp.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import transformers_dsv3


dist.init_process_group("gloo")
torch.set_num_threads(1)
for cls in (transformers_dsv3.Dsv3ForCausalLM, transformers_dsv3.Dsv3ForTokenClassification):
    torch.manual_seed(0)
    config = transformers_dsv3.Dsv3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = cls(config).train()
    model.gradient_checkpointing_enable()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        labels = tokens if cls is transformers_dsv3.Dsv3ForCausalLM else tokens % 2
        parallel(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    gathered = [torch.zeros_like(total) for _ in range(2)]
    dist.all_gather(gathered, total)
    assert gathered[0] == gathered[1]
    if dist.get_rank() == 0:
        print("trained", cls.__name__)
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
# Gloo's threads may still run, and abort the interpreter when it ends in the usual way
os._exit(0)
