"""Steps of expert-specialised fine-tuning on two ranks beside one process. Started by test_esft.py with torchrun."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import transformers_dsv3


dist.init_process_group("gloo")
torch.set_num_threads(1)
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
model = transformers_dsv3.Dsv3ForCausalLM(config).train()
alone = copy.deepcopy(model)
selection = transformers_dsv3.ExpertSelection({1: (0, 3)}, 4, "token", 0.5)
tokens = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(1))


def train(model, forward, rows):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        batch = tokens[2 * step : 2 * step + 2][rows]
        forward(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


for one in (model, alone):
    transformers_dsv3.train_selected_experts(one, selection)
before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
rank = dist.get_rank()
train(model, DistributedDataParallel(model), slice(rank, rank + 1))
train(alone, alone, slice(0, 2))
for name, tensor in model.state_dict().items():
    torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    if ".layers.1.mlp.experts." in name:
        assert torch.equal(tensor[1:3], before[name][1:3]) and not torch.equal(tensor[0], before[name][0])
    else:
        assert torch.equal(tensor, before[name]), name
if rank == 0:
    print("as one process")
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
# Gloo's threads may still run, and abort the interpreter when it ends in the usual way
os._exit(0)
