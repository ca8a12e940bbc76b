"""Trains a model by `use_liger_kernel=True`, and reports what was patched with what. Started by test_liger.py.

In a process of its own, since Liger-Kernel puts its classes into native's module, whichever model it is given.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main():
    checkpoint, output, *options = sys.argv[1:]
    if "--plugin" in options:
        import transformers_dsv3  # noqa: F401
    arguments = TrainingArguments(
        output_dir=output, use_liger_kernel=True, use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    rows = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}] * 8
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    report = {"module": type(model).__module__.split(".")[0], "error": None}
    try:
        trainer.train()
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    report["patched"] = {
        name: module.__dict__["forward"].__qualname__
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }
    Path(output, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
