"""Loads a checkpoint, compresses it to 4 bits and writes text: one program for this machine and for an emulated ARM.

python arm64_generate.py CHECKPOINT PROMPT[,TOKEN...] RESULT.json
"""

import json
import platform
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import transformers_dsv3
from transformers_dsv3.kernels.cpu import library, step


checkpoint, prompt, result = sys.argv[1:]
steps, run = [], step.Program.run
step.Program.run = lambda self, *arguments: steps.append(1) or run(self, *arguments)
found = {
    "machine": platform.machine(),
    "torch": torch.__version__,
    "plugin": transformers_dsv3.__name__,
    "instruction set": library.instruction_set(),
}
prompt = torch.tensor([[int(token) for token in prompt.split(",")]])
for dtype in (torch.float32, torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    transformers_dsv3.quantize(model, bits=4, activations="8")
    del steps[:]
    began = time.perf_counter()
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        logits = model(text).logits.float()
    found[str(dtype)] = {
        "text": text.tolist(),
        "steps": len(steps),
        "seconds": seconds,
        "logits": logits[0, ::8, :8].tolist(),
    }
    found[str(dtype)]["explain"] = transformers_dsv3.explain(model)
with open(result, "w") as file:
    json.dump(found, file)
