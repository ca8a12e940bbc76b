"""Run without the plugin: plain PEFT and TRL on native Transformers' classes.

Takes a JSON list of jobs and a folder. A job has `name`, `model` (a folder), `ids`, perhaps an `adapter` (a folder),
and perhaps `texts` and `trainer` (`sft` or `dpo`), on which one step is trained from there. Writes logits to `NAME.pt`
and what the trainers logged to `logged.json`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def train(job, folder):
    """Loss of one step, and for DPO the log-probabilities that it is made of."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    make, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[job["trainer"]]
    arguments = config(
        output_dir=str(folder / "trained"),
        max_steps=1,
        per_device_train_batch_size=len(job["texts"]),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows = job["texts"] if job["trainer"] == "dpo" else [{"text": text} for text in job["texts"]]
    trainer = make(
        model=job["model"],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {name: float(value) for name, value in logged.items() if name == "loss" or name.startswith("logps/")}


def main():
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    logged = {}
    for job in jobs:
        model = AutoModelForCausalLM.from_pretrained(job["model"])
        assert type(model).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
        if "adapter" in job:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, job["adapter"])
        with torch.no_grad():
            torch.save(model.eval()(torch.tensor([job["ids"]])).logits[0], folder / f"{job['name']}.pt")
        if "save" in job:
            model.save_pretrained(job["save"])
        if "trainer" in job:
            logged[job["name"]] = train(job, folder)
    (folder / "logged.json").write_text(json.dumps(logged))
    assert "transformers_dsv3" not in sys.modules


if __name__ == "__main__":
    main()
