"""Adapt a model to a domain with LoRA within a budget of trainable parameters, by TRL's SFTTrainer and PEFT.

    transformers-dsv3 quickstart
    python examples/lora_sft.py --model ./dsv3-quickstart --output_dir ./dsv3-lora

adapts 1 % of the parameters to the reference documentation that comes with Python, and measures both the domain and
general text on what was held out. The same command again, after any interruption, goes on from the last checkpoint.
Your own domain, any dataset that TRL reads (text, prompt and completion, messages), any flag of SFTConfig:

    python examples/lora_sft.py --model ./my-model --text ./manuals --general ./notes --budget 0.001
    python examples/lora_sft.py --model ./my-model --dataset ./pairs.jsonl --where attention --rank 8 --packing false

examples/adapt.md says what to expect of a budget. Needs `datasets`.
"""

from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer

from transformers_dsv3 import lora_config
from transformers_dsv3.data.text_stream import stream_files
from transformers_dsv3.evaluation.training_record import digest_of_rows, loss_results, save_training_record
from transformers_dsv3.training.held_out_metrics import loss_changes
from transformers_dsv3.training.model_arguments import read_config
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, exit_on_refusal
from transformers_dsv3.training.text_arguments import DomainArguments


@dataclass
class LoraArguments:
    """The checkpoint, and what of it is adapted."""

    model: str = HfArg(
        default="./dsv3-quickstart", help="An official deepseek_v3 checkpoint: a folder, or a name on the Hub."
    )
    budget: float | None = HfArg(
        default=None, help="Greatest share of trainable parameters. Default: 0.01, without --rank."
    )
    rank: int | None = HfArg(default=None, help="In place of --budget, the rank of every adapter.")
    where: list[str] = HfArg(
        default_factory=lambda: ["auto"],
        help="auto, or some of attention, dense, shared_experts, experts, linear, mlp and all.",
    )


def main(lora_args: LoraArguments, domain_args: DomainArguments, args: SFTConfig) -> None:
    folder = RunFolder(args.output_dir)
    with exit_on_refusal():  # whatever is wrong with what was asked for, before anything is trained
        read_config(lora_args.model)
        domain = domain_args.examples(args.seed, exclude=folder.path)
        general = stream_files(domain_args.general)
        if "head" in lora_args.where:
            raise ValueError("--where head: TRL reads the output head's weights past an adapter; use Trainer for it")
        settings = {**asdict(lora_args), **asdict(domain_args), "text": domain.source, "seed": args.seed}
        folder.check(settings)
        checkpoint = folder.checkpoint_to_resume(args)
        tokenizer = AutoTokenizer.from_pretrained(lora_args.model)
        domain.check(tokenizer)
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(lora_args.model, dtype=torch.float32)
        where = "auto" if lora_args.where == ["auto"] else lora_args.where
        budget = 0.01 if lora_args.budget is None and lora_args.rank is None else lora_args.budget
        peft_config = lora_config(model, budget, lora_args.rank, where=where)
    print(f"Domain: {domain.source}. General: {general.source}, {general.split}.")
    if not args.packing and args.max_length and (cut := domain.cut(tokenizer, args.max_length)):
        print(cut)

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=domain.train,
        eval_dataset={"domain": domain.held_out, "general": Dataset.from_dict({"text": list(general.held_out)})},
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    folder.record(settings, tokenizer)  # once the trainer has taken data and flags
    before = folder.measured_before(trainer.evaluate)

    def record(after: dict[str, float]) -> None:
        trained, total = trainer.model.get_nb_trainable_parameters()
        save_training_record(
            folder.path,
            method="LoRA",
            arguments=args,
            state=trainer.state,
            data={"source": domain.source, "documents": len(domain.train), "sha256": digest_of_rows(domain.train)},
            parameters={"trained": trained, "total": total},
            settings={"budget": budget, "where": lora_args.where, "max_length": args.max_length},
            base=lora_args.model,
            results=loss_results(before, after),
        )

    print(loss_changes(before, folder.train_evaluate_save(trainer, checkpoint, record)))
    trainer.model.merge_and_unload().save_pretrained(folder.path / "merged")
    tokenizer.save_pretrained(folder.path / "merged")
    print(f"The adapter is in {folder.path}, the whole model in {folder.path / 'merged'}: pipeline() opens both.")


if __name__ == "__main__":
    parser = ScriptArgumentParser((LoraArguments, DomainArguments, SFTConfig), description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-lora",
        max_steps=150,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=15,
        max_length=256,
        packing=True,
        packing_strategy="wrapped",  # nothing is cut off: texts are laid end to end
        eval_packing=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=torch.accelerator.is_available(),
    )
    parser.run(main)
