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

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from transformers_dsv3 import Dsv3Config, lora_config
from transformers_dsv3.data.local_paths import BUILDERS, local_or_hub
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.data.text_stream import stream_corpus, stream_files
from transformers_dsv3.evaluation.training_record import digest_of_rows, result, save_training_record
from transformers_dsv3.files import write_json
from transformers_dsv3.training.checkpoints import checkpoint_step
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser


@dataclass
class LoraArguments:
    """The checkpoint, what of it is adapted, and the text."""

    model: str = field(
        default="./dsv3-quickstart",
        metadata={"help": "An official deepseek_v3 checkpoint: a folder, or a name on the Hub."},
    )
    budget: float | None = field(
        default=None, metadata={"help": "Greatest share of trainable parameters. Default: 0.01, without --rank."}
    )
    rank: int | None = field(default=None, metadata={"help": "In place of --budget, the rank of every adapter."})
    where: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "auto, or some of attention, dense, shared_experts, experts, linear, mlp and all."},
    )
    text: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders to train on. Default: the reference documentation of Python."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "In place of --text, a dataset's name, or a .jsonl, .parquet or .csv file."}
    )
    general: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders of general text, of which a part is measured. Default: standard library."},
    )


def domain_data(arguments: LoraArguments, seed: int, exclude: Path) -> tuple[Dataset, Dataset, str]:
    """Examples to train on, examples held out, and what they are."""
    if arguments.text and arguments.dataset:
        raise ValueError("--text and --dataset: give one of them")
    if arguments.dataset:
        name = local_or_hub(arguments.dataset)
        builder = BUILDERS.get(Path(name).suffix)
        try:
            data = load_dataset(builder or name, split="train", **({"data_files": name} if builder else {}))
        except Exception as error:  # of many kinds, by the file's format; StopIteration where there is nothing
            raise ValueError(f"--dataset {name} cannot be read: {error or 'it has no rows'}") from error
        if len(data) < 2:
            raise ValueError(f"--dataset {name}: {len(data)} examples, some are to train on and some are held out")
        if not {"text", "prompt", "messages"} & set(data.column_names):
            raise ValueError(f"--dataset {name} has no column text, prompt or messages: {data.column_names}")
        parts = data.train_test_split(min(200, max(1, len(data) // 10)), seed=seed)
        return parts["train"], parts["test"], arguments.dataset
    if arguments.text:
        stream = stream_files([Path(path) for path in arguments.text], seed=seed, exclude=exclude)
    else:
        stream = stream_corpus(python_reference(), seed)
    train = Dataset.from_dict({"text": [row[stream.text_column] for row in stream.texts_of_pass(0)]})
    return train, Dataset.from_dict({"text": list(stream.held_out)}), f"{stream.source}, {stream.split}"


def main(lora_args: LoraArguments, training_args: SFTConfig) -> None:
    folder = RunFolder(training_args.output_dir)
    try:  # whatever is wrong with what was asked for, before anything is trained
        config = AutoConfig.from_pretrained(local_or_hub(lora_args.model, one_of=["config.json"]))
        if not isinstance(config, Dsv3Config):
            raise ValueError(f"--model {lora_args.model} is of model type {config.model_type!r}, not deepseek_v3")
        train, held_out, source = domain_data(lora_args, training_args.seed, folder.path)
        general = stream_files([Path(path) for path in lora_args.general] if lora_args.general else None)
        if training_args.max_steps < 1:
            raise ValueError("--max_steps: give the length of the run in steps")
        if "head" in lora_args.where:
            raise ValueError("--where head: TRL reads the output head's weights past an adapter; use Trainer for it")
        settings = {**asdict(lora_args), "text": source, "seed": training_args.seed}
        folder.check(settings)
        checkpoint = folder.checkpoint_to_resume(training_args)
        tokenizer = AutoTokenizer.from_pretrained(lora_args.model)
        if "messages" in train.column_names and tokenizer.chat_template is None:
            raise ValueError("--dataset has messages, for which the model's tokenizer needs a chat template")
        set_seed(training_args.seed)
        model = AutoModelForCausalLM.from_pretrained(lora_args.model, dtype=torch.float32)
        where = "auto" if lora_args.where == ["auto"] else lora_args.where
        budget = 0.01 if lora_args.budget is None and lora_args.rank is None else lora_args.budget
        peft_config = lora_config(model, budget, lora_args.rank, where=where)
    except (ValueError, OSError) as error:
        sys.exit(f"lora_sft.py: {error}")
    print(f"Domain: {source}. General: {general.source}, {general.split}.")
    if not training_args.packing and "text" in train.column_names and training_args.max_length:
        long = sum(len(tokenizer(text).input_ids) > training_args.max_length for text in train["text"])
        print(f"{long:,} of {len(train):,} examples are cut at --max_length {training_args.max_length}.")

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset={"domain": held_out, "general": Dataset.from_dict({"text": list(general.held_out)})},
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    folder.record(settings, tokenizer)  # once the trainer has taken data and flags
    before_path = folder.path / "before_results.json"
    if not before_path.exists():
        write_json(before_path, trainer.evaluate())
    if checkpoint is not None and checkpoint_step(checkpoint) == training_args.max_steps:
        trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)  # only the end is left to do
    before = json.loads(before_path.read_text())

    def record(after: dict[str, float]) -> None:
        trained, total = trainer.model.get_nb_trainable_parameters()
        losses = {name: f"eval_{name}_loss" for name in ("domain", "general")}
        save_training_record(
            folder.path,
            method="LoRA",
            arguments=training_args,
            state=trainer.state,
            data={"source": source, "documents": len(train), "sha256": digest_of_rows(train)},
            parameters={"trained": trained, "total": total},
            settings={"budget": budget, "where": lora_args.where, "max_length": training_args.max_length},
            base=lora_args.model,
            results=[result("loss", f"held-out {n} text", after[key], before[key]) for n, key in losses.items()],
        )

    folder.train_evaluate_save(trainer, checkpoint, record)
    trainer.model.merge_and_unload().save_pretrained(folder.path / "merged")
    tokenizer.save_pretrained(folder.path / "merged")

    after = json.loads((folder.path / "eval_results.json").read_text())
    for name in ("domain", "general"):
        values = [results[f"eval_{name}_loss"] for results in (before, after)]
        print(f"{name:8} held-out loss {values[0]:.3f} before, {values[1]:.3f} after ({values[1] - values[0]:+.3f})")
    print(f"The adapter is in {folder.path}, the whole model in {folder.path / 'merged'}: pipeline() opens both.")


if __name__ == "__main__":
    parser = ScriptArgumentParser((LoraArguments, SFTConfig), description=__doc__)
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
        logging_steps=10,
        save_steps=50,
        save_total_limit=2,
        report_to="none",
        gradient_checkpointing=False,
        # Two threads otherwise add the gradients of an embedding row in any order, and no two runs end alike.
        full_determinism=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    arguments = parser.parse_args_into_dataclasses()
    with RunFolder(arguments[-1].output_dir).explaining_interruption(arguments[-1]):
        main(*arguments)
