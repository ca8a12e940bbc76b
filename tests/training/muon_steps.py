"""Muon with QK-clip on the processes of one group, by each way to share a model, started by test_muon_sharded.py.

    muon_steps.py FOLDER WAY...

FOLDER has the model, and gets a folder for each way. `run` is also what the tests themselves call for one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


sys.path.insert(0, str(Path(__file__).parent))
from parallel_steps import Rows

from transformers_dsv3 import (
    LoadBalancingCallback,
    MtpObjectiveCallback,
    PipelineArguments,
    PipelineTrainer,
    QkClipCallback,
    muon,
)
from transformers_dsv3.training.parallel import distribute


WAYS = ("DDP", "FSDP2", "EP=2", "1F1B", "ZBV")
ROWS_A_STEP = 8
CLIPPED_AT = 0.3  # which some heads of a model that has learned nothing are above


def run(folder, output, way):
    torch.manual_seed(0)
    sharded = {"distributed_config": {"ep_size": 2}} if way == "EP=2" else {}
    model = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), **sharded)
    if way == "FSDP2":
        model = distribute(model, {"fsdp_size": 2})
    share = 2 if way in ("DDP", "FSDP2", "EP=2") else 1
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=4,
        per_device_train_batch_size=ROWS_A_STEP // share,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    given = {
        "model": model,
        "args": arguments,
        "train_dataset": Rows(64, model.config.vocab_size),
        "callbacks": [LoadBalancingCallback(), MtpObjectiveCallback(), QkClipCallback(threshold=CLIPPED_AT)],
        "optimizer_cls_and_kwargs": muon(lr=0.02, newton_schulz_dtype=torch.float32),
    }
    if way in ("1F1B", "ZBV"):
        trainer = PipelineTrainer(**given, pipeline=PipelineArguments(schedule=way, microbatches=4))
    else:
        trainer = Trainer(**given)
    trainer.train()
    trainer.save_model()
    names = ("loss", "attention/max_logit", "attention/clipped_heads")
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


def main():
    folder, *ways = sys.argv[1:]
    for way in ways:
        report = run(folder, Path(folder, way), way)
        if os.environ["RANK"] == "0":
            Path(folder, way, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run, and abort the interpreter when it ends in the usual way
