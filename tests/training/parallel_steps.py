"""A user's training script, for one process or several, in the modes of examples/parallel.md.

    python parallel_steps.py --model FOLDER --output FOLDER
    torchrun --nproc_per_node 2 parallel_steps.py --model FOLDER --output FOLDER [--distributed '{"tp_size": 2}']
    accelerate launch --config_file examples/accelerate_fsdp2.yaml parallel_steps.py --model FOLDER --output FOLDER

Every step is on the same rows, however many processes share them. Started by test_parallel.py.
"""

import argparse
import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback
from transformers_dsv3.training.parallel import CpuParallelismConfig, distribute


ROWS_A_STEP = 4
REPORTED = ("loss", "grad_norm", "mtp/loss", "router/utilisation")


class Rows(torch.utils.data.Dataset):
    """Rows of different length, padded on the right: the ranks of a step have different numbers of targets."""

    def __init__(self, count, vocab_size, length=16):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocab_size, (count, length), generator=generator)
        self.lengths = torch.randint(length // 2, length + 1, (count,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        mask = torch.arange(self.tokens.shape[1]) < self.lengths[index]
        tokens = self.tokens[index]
        return {
            "input_ids": tokens.where(mask, 0),
            "labels": tokens.where(mask, -100),
            "attention_mask": mask.long(),
        }


def turn_on_accelerate_fsdp():
    """accelerate's own FSDP2 between CPUs. It chooses it on GPUs only, but what it then does runs on CPUs as well."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = Accelerator(cpu=True).state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert state.is_fsdp2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optim", default="sgd")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--distributed", type=json.loads, help="distributed_config of from_pretrained")
    parser.add_argument("--in-memory", action="store_true", help="shard the model as one that has no checkpoint")
    parser.add_argument("--accelerate-fsdp", action="store_true")
    parser.add_argument("--save-everywhere", action="store_true", help="for Trainers that save on one rank alone")
    args = parser.parse_args()
    if args.accelerate_fsdp:
        turn_on_accelerate_fsdp()

    if args.in_memory:
        model = distribute(AutoModelForCausalLM.from_pretrained(args.model), args.distributed)
    else:
        sharded = {"distributed_config": args.distributed} if args.distributed else {}
        model = AutoModelForCausalLM.from_pretrained(args.model, **sharded)
    # Ranks of one tensor-parallel group have the same rows, all others different ones
    with_own_rows = int(os.environ.get("WORLD_SIZE", 1)) // (getattr(model, "tp_size", None) or 1)
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=ROWS_A_STEP // with_own_rows // args.gradient_accumulation_steps,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        optim=args.optim,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        parallelism_config=CpuParallelismConfig() if getattr(model, "tp_size", None) else None,
        accelerator_config={"use_configured_state": args.accelerate_fsdp},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(64, model.config.vocab_size),
        callbacks=[
            LoadBalancingCallback(bias_update_rate=0.02, decay_ratio=0.0, seq_aux_loss_weight=0.01),
            MtpObjectiveCallback(),
        ],
    )
    trainer.train()
    model = trainer.model_wrapped
    local = [getattr(p, "_local_tensor", p).numel() for p in model.parameters()]
    if args.save_everywhere:
        trainer.model.save_pretrained(args.output)
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        report = {name: [entry[name] for entry in steps] for name in REPORTED}
        report |= {"class": type(model).__name__, "local_parameters": sum(local)}
        with open(os.path.join(args.output, "steps.json"), "w") as file:
            json.dump(report, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Gloo's threads may still run, and abort the interpreter when it ends in the usual way
        os._exit(0)
