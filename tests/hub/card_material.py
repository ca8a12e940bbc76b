"""Checkpoints, adapters and records that cards are made from, as the commands and scripts leave them."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerState, TrainingArguments

from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_identity
from transformers_dsv3.evaluation.evaluation_record import new_record
from transformers_dsv3.evaluation.routing import routing_report
from transformers_dsv3.evaluation.training_record import result, save_training_record


SECRET = "hf_" + "SecretOfSomebody" * 2


def train(folder, method="pre-training", base=None, results=None, **extra):
    """Leaves the record of a run beside a checkpoint."""
    folder = Path(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=20,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
    )
    log = [{"loss": 5.0 / step, "router/utilisation": 0.5 + step / 50, "step": step} for step in range(1, 21)]
    state = TrainerState(log_history=[*log, {"train_runtime": 161.2, "step": 20}], global_step=20)
    command, sys.argv = sys.argv, ["/opt/bin/transformers-dsv3", "quickstart", "--text", "/home/ada/notes"]
    try:
        return save_training_record(
            folder,
            method=method,
            arguments=arguments,
            state=state,
            data={"source": "the notes of Ada", "split": "1 of 9 files held out", "fingerprint": "f" * 64},
            block_size=64,
            settings={"block_size": 64, "long": list(range(200))},
            base=base,
            results=[result("bits_per_byte", "held-out text", 1.8683, None, {"zlib -9": 2.136})]
            if results is None
            else results,
            **extra,
        )
    finally:
        sys.argv = command


def evaluation(folder, model, command="transformers-dsv3 evaluate model", base=None, **changes):
    """A complete record of the checkpoint in a folder, its figures made up but for the routing."""
    folder = Path(folder)
    record = new_record(
        checkpoint_identity(folder, base=base),
        command=command,
        settings={"what": ["text"], "window": 64, "limit": None},
        seed=0,
    )
    record.date = "2026-01-31T12:00:00+00:00"
    record.complete = True
    record.text = {
        "source": "the notes of Ada, 1 of 9 files held out",
        "sha256": "a" * 64,
        "documents": 3,
        "bytes": 45_678,
        "tokens": 12_345,
        "window": 64,
        "stride": 32,
        "bits_per_byte": 1.86834,
        "nats_per_token": 4.5,
        "perplexity": 90.017,
        "byte_perplexity": 3.65,
        "zlib_bits_per_byte": 2.136,
        "lzma_bits_per_byte": 1.888,
    }
    if model is not None:
        stream = torch.randint(0, 256, (512,), generator=torch.Generator().manual_seed(0))
        record.routing = {"source": "notes", "sha256": "a" * 64, **routing_report(model, stream, window=64).to_dict()}
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def tasks_and_human_eval():
    def task(metric, value, dataset, subtasks=()):
        figure = {"value": value, "stderr": 0.0134, "higher_is_better": True}
        counts = {"n": 4, "n_total": 1319, "num_fewshot": 5, "version": 3, "samples_sha256": "b" * 64}
        return {
            **counts,
            "metrics": {metric: figure},
            "dataset": dataset,
            "subtasks": list(subtasks),
            "truncated": False,
        }

    return {
        "text": None,
        "routing": None,
        "settings": {"what": [], "limit": 4},
        "tasks": {
            "gsm8k": task("exact_match,strict-match", 0.25, "openai/gsm8k"),
            "mmlu": task("acc,none", 0.3, "cais/mmlu", ["mmlu_law"]),
            "mmlu_law": task("acc,none", 0.4, "cais/mmlu"),
            "own": task("acc,none", None, "json"),
        },
        "human_eval": {
            "problems": 164,
            "samples": 1,
            "pass@k": {"1": {"value": 0.0122, "stderr": 0.0086}},
            "outcomes": {"passed": 2, "raised AssertionError": 162},
            "sandbox": "namespaces",
        },
    }


def save_adapter(base, model, folder, **fields):
    """A LoRA adapter of a folder's model, which it names by its path."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["o_proj"], **fields})
    get_peft_model(model, config).save_pretrained(folder)
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's own template
    return Path(folder)
