"""Two processes that share models by heads and experts: `torchrun --nproc_per_node 2 sharded_models.py FOLDER...`.

Each process also holds the whole model, and compares. Started by test_sharded_models.py.
"""

import os
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import transformers_dsv3  # noqa: F401
from transformers_dsv3.kernels.backends import ABSORBED
from transformers_dsv3.models.dsv3 import attention_dsv3


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare_gradients(model, sharded, tokens, mask):
    for each in (model, sharded):
        each.train()
        labels = tokens.where(mask.bool(), -100)
        each(tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(whole(parameter.grad), expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    for each in (model, sharded):
        each.zero_grad(set_to_none=True)
        each.eval()


def compare_generation(model, sharded, tokens, mask, heads):
    absorbed = []
    backend = ABSORBED["cpu"]
    plain, compiled = attention_dsv3.absorbed_attention, backend.undispatched

    def count(function):
        def counted(q_nope, *args):
            absorbed.append(q_nope.shape[1])
            return function(q_nope, *args)

        return counted

    for settings in ({}, {"cache_implementation": "static"}, {"use_mtp": True}):
        if "use_mtp" in settings and not model.config.num_nextn_predict_layers:
            continue
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
        inputs = {"input_ids": tokens.flip(1), "attention_mask": mask.flip(1)}  # padded on the left
        expected = model.generate(**inputs, **settings)
        attention_dsv3.absorbed_attention, backend.undispatched = count(plain), count(compiled)
        try:
            seen = sharded.generate(**inputs, **settings)
        finally:
            attention_dsv3.absorbed_attention, backend.undispatched = plain, compiled
        assert torch.equal(seen, expected), settings
        assert set(absorbed) == {heads}, absorbed


def compare_saved(folder, sharded, name):
    """What the sharded model saves is the file it came from, byte for byte, its correction bias in fp32."""
    saved = f"{folder}-saved-{name.replace(' ', '-')}"
    sharded.save_pretrained(saved)
    torch.distributed.barrier()
    written, source = (load_file(os.path.join(path, "model.safetensors")) for path in (saved, folder))
    assert written.keys() == source.keys()
    for key, tensor in source.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key


def configurations():
    yield "tp", {"tp_size": 2}
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        yield "ep and tp", {"tp_size": 2, "ep_size": 2}
        yield "ep", {"ep_size": 2}
    else:
        yield "ep of older transformers", {"tp_size": 2, "enable_expert_parallel": True}


def main():
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    for folder in sys.argv[1:]:
        for implementation in ("sdpa", "eager"):
            kwargs = {"mtp_loss_weight": 0.3, "attn_implementation": implementation}
            model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
            in_bf16 = model.dtype == torch.bfloat16
            for name, config in configurations():
                if name == "ep" and not model.config.n_shared_experts:
                    continue  # refused, see test_parallel.py
                sharded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **kwargs).eval()
                sharded.config.mtp_loss_weight = 0.0
                compare_saved(folder, sharded, name)
                sharded.config.mtp_loss_weight = 0.3
                if name != "ep" and not in_bf16:  # under FSDP2 the processes have rows of their own
                    with torch.no_grad():
                        expected, seen = (m(tokens, attention_mask=mask).logits for m in (model, sharded))
                    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=3e-5)  # sums in another order
                    compare_gradients(model, sharded, tokens, mask)
                    heads = model.config.num_attention_heads // (1 if name.startswith("ep of") else 2)
                    compare_generation(model, sharded, tokens, mask, heads)
                if torch.distributed.get_rank() == 0:
                    print("compared", os.path.basename(folder), implementation, name, flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads may still run, and abort the interpreter when it ends in the usual way
    os._exit(0)


main()
