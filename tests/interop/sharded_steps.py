"""A user's training script on one process or several, sharded by FSDP or DeepSpeed by the names of native's classes.

    torchrun --nproc_per_node 2 sharded_steps.py --model FOLDER --output FOLDER --engine fsdp1 [--plugin]

Every step is on the same rows, however many processes share them. Without `--plugin` it is native's model that trains.
Started by test_fsdp.py and test_deepspeed.py.
"""

import argparse
import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


ROWS_A_STEP = 4
LAYER = "DeepseekV3DecoderLayer"
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        # Of a model this small every parameter would stay on all ranks
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


class Rows(torch.utils.data.Dataset):
    """Rows of one length, so that the mean of two ranks' losses is the loss of all rows."""

    def __init__(self, vocab_size, count=64, length=16):
        self.tokens = torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def turn_on_fsdp(version):
    """accelerate's own FSDP between CPUs. It chooses it on GPUs only, but what it then does runs on CPUs as well."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = Accelerator(cpu=True).state
    # The settings of `accelerate config`: fsdp_version and fsdp_transformer_layer_cls_to_wrap
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYER
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
    )
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # FSDP1 finds the parameters to be on `cpu`, which is another device to it than accelerate's `cpu:0`
    state.device = PartialState().device = torch.device("cpu")


def mark_leaves(model):
    """DeepSpeed's leaves, asked for by native's class and by its name: how many of each, and whether they agree."""
    from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules, unset_z3_leaf_modules
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    by_class = {id(module) for module in set_z3_leaf_modules(model, [DeepseekV3MoE])}
    unset_z3_leaf_modules(model, [DeepseekV3MoE])
    assert not get_z3_leaf_modules(model)
    by_name = {id(module) for module in set_z3_leaf_modules(model, ["DeepseekV3MoE"])}
    assert by_name == by_class
    return [name for name, module in model.named_modules() if id(module) in by_class]


def gather(wrapped, shapes):
    """The state dict of a model under FSDP1, from the flat part of each tensor that each rank has.

    PyTorch 2.13 frees the whole tensors on a CPU before it has copied them, native's as ours.
    """
    parts = [None] * torch.distributed.get_world_size()
    own = {name.replace("_fsdp_wrapped_module.", ""): tensor.detach() for name, tensor in wrapped.named_parameters()}
    torch.distributed.all_gather_object(parts, own)
    whole = {name: torch.cat([part[name].flatten() for part in parts]).view(shapes[name]) for name in own}
    buffers = {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in wrapped.named_buffers()}
    return whole | {name: tensor for name, tensor in buffers.items() if name in shapes}


def units(model):
    """Names of the modules that are sharded as one."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return [
        name.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")
        for name, module in model.named_modules()
        if isinstance(module, (FSDPModule, FullyShardedDataParallel))
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--engine", choices=["none", "fsdp1", "fsdp2", "zero3"], default="none")
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    if args.plugin:
        import transformers_dsv3  # noqa: F401
    if args.engine.startswith("fsdp"):
        turn_on_fsdp(int(args.engine[-1]))
    with_own_rows = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=3,
        per_device_train_batch_size=ROWS_A_STEP // with_own_rows,
        gradient_checkpointing=args.gradient_checkpointing,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=ZERO_3 if args.engine == "zero3" else None,
        accelerator_config={"use_configured_state": args.engine.startswith("fsdp")},
    )
    # After the arguments: DeepSpeed shards parameters when they are made
    model = AutoModelForCausalLM.from_pretrained(args.model)
    report = {"module": type(model).__module__.split(".")[0]}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if args.engine == "zero3":
        report["leaves"] = mark_leaves(model)
        report["sharded_when_loaded"] = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(model.config.vocab_size))
    trainer.train()
    if args.engine == "fsdp1":
        model.save_pretrained(args.output, state_dict=gather(trainer.model_wrapped, shapes))
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        report |= {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")}
        report |= {"wrapped": type(trainer.model_wrapped).__name__, "units": units(trainer.model_wrapped)}
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
