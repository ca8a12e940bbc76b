"""Loads a checkpoint over two pipeline stages, computes logits and generates. Started by test_pipeline_stages.py.

torchrun --nproc_per_node 2 pipelined_steps.py CHECKPOINT OUTPUT_FOLDER [--plugin] [--mtp]
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


TOKENS = torch.arange(4, 28).view(2, 12)


@torch.no_grad()
def main():
    checkpoint, output, *options = sys.argv[1:]
    if "--plugin" in options:
        import transformers_dsv3  # noqa: F401
    distributed = {"distributed_config": {"pp_size": 2}} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **distributed).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    report = {
        "module": type(model).__module__.split(".")[0],
        "names": [name for name, _ in model.named_parameters()],
        "logits": model(TOKENS).logits.tolist(),
        "tokens": model.generate(TOKENS, **settings).tolist(),
    }
    if "--mtp" in options:
        try:
            report["drafted"] = model.generate(TOKENS[:1], use_mtp=True, **settings).tolist()
        except ValueError as refusal:
            report["refusal"] = str(refusal)
    rank = os.environ.get("RANK", "alone")
    Path(output, f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)
