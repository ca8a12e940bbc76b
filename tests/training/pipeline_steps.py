"""Runs of `PipelineTrainer` on the processes of one group, started by test_pipeline.py: a case after the other.

    pipeline_steps.py FOLDER CASE...

FOLDER has the model, and gets a folder for each case. `run` is also what the tests themselves call for one process.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


sys.path.insert(0, str(Path(__file__).parent))
from parallel_steps import REPORTED, Rows

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback, PipelineArguments, PipelineTrainer


class Stream(IterableDataset):
    """The rows of a data set, as many as there are."""

    def __init__(self, rows, count):
        self.rows, self.count = rows, count

    def __iter__(self):
        return (self.rows[index] for index in range(self.count))


class OfLengths:
    """Rows cut to the length that a batch of 8 has, so that batches differ in shape."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: value[: 16 - 4 * (index // 8 % 2)] for name, value in self.rows[index].items()}


PIPELINES = {
    "GPipe": {"schedule": "GPipe", "microbatches": 2, "cut": "layers"},
    "1F1B": {"schedule": "1F1B", "microbatches": 4},
    "Interleaved1F1B": {"schedule": "Interleaved1F1B", "microbatches": 4},
    "InterleavedZeroBubble": {"schedule": "InterleavedZeroBubble", "microbatches": 4},
    "ZBV": {"schedule": "ZBV", "microbatches": 4},
    "ZBV by layers": {"schedule": "ZBV", "microbatches": 4, "cut": "layers"},
    "DualPipeV": {"schedule": "DualPipeV", "microbatches": 4},
    "DualPipeV of 8": {"schedule": "DualPipeV", "microbatches": 8},
}
# Settings of a run, whose results are those of one process with the same settings
SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "clipping": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "stream": {},
    "lengths": {},
    "long": {"max_steps": 20},
    "tied": {},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_strategy": "steps"}
    | {"save_steps": 1, "save_total_limit": 1},
}


def run(folder, output, settings, pipeline=None, resume=None, data=None, **more):
    """A training run; its losses and so on, with the loss on held-out rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=settings == "tied")
    rows = Rows(64, model.config.vocab_size)
    if settings == "stream":
        data = data or Stream(rows, 64)
    elif settings == "lengths":
        data = data or OfLengths(rows)
        more["train_sampling_strategy"] = "sequential"
    arguments = TrainingArguments(
        output_dir=output,
        **{"max_steps": 3, "per_device_train_batch_size": 8, "save_strategy": "no"} | SETTINGS[settings] | more,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    given = {
        "model": model,
        "args": arguments,
        "train_dataset": data or rows,
        "eval_dataset": Rows(11, model.config.vocab_size),
        "callbacks": [
            LoadBalancingCallback(bias_update_rate=0.02, decay_ratio=0.0, seq_aux_loss_weight=0.01),
            MtpObjectiveCallback(),
        ],
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    }
    if pipeline is None:
        trainer = Trainer(**given)
    else:
        trainer = PipelineTrainer(**given, pipeline=PipelineArguments(**pipeline))
    passes = []
    if settings == "checkpointing":
        for layer in model.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(lambda layer, _: passes.append(1) if layer.training else None)
    trainer.train(resume_from_checkpoint=resume)
    report = {name: [e[name] for e in trainer.state.log_history if name in e] for name in REPORTED}
    report["eval_loss"] = [trainer.evaluate()["eval_loss"]]
    report["eval_losses"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    report["total_flos"] = [trainer.state.total_flos]
    trainer.save_model()
    if pipeline is not None:
        report["passes"] = len(passes)
        report["table"] = trainer.pipeline.table
        report["here"] = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
        report["all"] = model.num_parameters()
    return report


class ForgetsRows(Rows):
    """Rows that are other ones on the second rank."""

    def __getitem__(self, index):
        return super().__getitem__((index + int(os.environ["RANK"])) % len(self))


class Fails(Rows):
    def __getitem__(self, index):
        if os.environ["RANK"] == "1":
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def refusals(folder, output):
    """What every process says of runs that cannot be, and how long it took for all of them."""
    rank = int(os.environ["RANK"])
    rows = Rows(64, 96)
    f1b = PIPELINES["1F1B"]
    runs = {
        "other rows": {"data": ForgetsRows(64, 96)},
        "a failing dataset": {"data": Fails(64, 96)},
        "a shorter stream": {"data": Stream(rows, 64 - 60 * rank), "settings": "stream"},
        "a broken last batch": {"data": Stream(rows, 13), "settings": "stream"},
        "a broken data set": {"data": Rows(13, 96)},
        "other settings": {"pipeline": {**f1b, "microbatches": 4 + 4 * rank}},
        "tokens out of range": {"data": Rows(64, 1000)},
    }
    said = {}
    for name, changed in runs.items():
        try:
            run(folder, output, **{"settings": "plain", "pipeline": f1b, **changed})
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def begin(folder, output, name):
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(Path(folder, "model"), output, "plain", PIPELINES[name], max_steps=2, **saving)


def main():
    folder, *cases = sys.argv[1:]
    rank = int(os.environ["RANK"])
    for case in cases:
        output = Path(folder, "resume" if "-" in case else case)
        if case == "refusals":
            report = refusals(Path(folder, "model"), output)
        elif case.startswith("resume "):  # FIRST SECOND, either of which may be "-", for another group of processes
            _, first, second = case.split(" ")
            if first != "-":
                begin(folder, output, first)
            if second == "-":
                continue
            checkpoint = str(output / "checkpoint-2")
            report = run(Path(folder, "model"), output, "plain", PIPELINES[second], resume=checkpoint)
        else:
            name, settings = case.split(", ")
            report = run(Path(folder, "model"), output, settings, copy.deepcopy(PIPELINES[name]))
        output.mkdir(exist_ok=True)
        (output / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run, and abort the interpreter when it ends in the usual way
