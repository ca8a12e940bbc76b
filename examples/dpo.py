"""Align a DeepSeek-V3 with direct preference optimisation, TRL's own trainer, on pairs made from real source code.

    transformers-dsv3 quickstart && python examples/dpo.py

teaches the quickstart's model to prefer a function's own body to one that repeats a line. The same command again,
after any interruption, goes on from the last checkpoint. Another checkpoint, your own pairs, any flag of TRL's
DPOConfig:

    python examples/dpo.py --model ./my-model --dataset ./pairs.jsonl --output_dir ./aligned --beta 0.3

A dataset has columns prompt, chosen and rejected. examples/align.md has figures. Needs `datasets`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import transformers_dsv3  # noqa: F401  registers the architecture
from transformers_dsv3.data.local_paths import local_or_hub
from transformers_dsv3.data.preference_pairs import CORRUPTIONS, check_pairs, dataset_pairs, function_pairs
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.evaluation.preferences import preference_accuracy
from transformers_dsv3.evaluation.text_quality import bits_per_byte
from transformers_dsv3.evaluation.training_record import digest_of_rows, result, save_training_record
from transformers_dsv3.files import write_json
from transformers_dsv3.training.checkpoints import checkpoint_step
from transformers_dsv3.training.run_folder import RunFolder, save_whole
from transformers_dsv3.training.script_arguments import ScriptArgumentParser


@dataclass
class PairArguments:
    """The checkpoint and the pairs."""

    model: str = field(default="./dsv3-quickstart", metadata={"help": "An official deepseek_v3 checkpoint."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A dataset's name or file with prompt, chosen, rejected. Default: functions of the library."
        },
    )
    kinds: list[str] = field(
        default_factory=lambda: ["single_quotes"],
        metadata={"help": f"What is wrong in the rejected bodies: {', '.join(CORRUPTIONS)}."},
    )
    eval_pairs: int = field(default=200, metadata={"help": "Pairs held out, of other files than the training's."})
    results: str | None = field(default=None, metadata={"help": "A JSON file that collects the results by seed."})


def make_pairs(arguments: PairArguments, number: int, seed: int) -> tuple[list[dict], list[dict], str]:
    """Pairs to train on, pairs held out, and plain text that was held out from the quickstart's training too."""
    corpus = build_corpus(standard_library(), "the Python standard library")
    text = "\n".join(document.text for document in corpus.held_out)[:100_000]
    if arguments.dataset is None:
        train = function_pairs(corpus.train, arguments.kinds, limit=number, seed=seed)
        return train, function_pairs(corpus.held_out, arguments.kinds, limit=arguments.eval_pairs), text
    return *dataset_pairs(arguments.dataset, held_out=arguments.eval_pairs), text


def main(arguments: PairArguments, args: DPOConfig) -> None:
    folder = RunFolder(args.output_dir)
    kept = ("seed", "beta", "loss_type", "max_steps", "max_length")
    settings = {**asdict(arguments), **{name: getattr(args, name) for name in kept}}
    settings.pop("results")
    try:  # whatever is wrong with what was asked for, before anything is trained
        folder.check(settings)
        tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer or arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            local_or_hub(arguments.model, one_of=["config.json"]), dtype=torch.float32
        )
        number = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        train, held_out, text = make_pairs(arguments, number, args.seed)
        for name, rows in (("Training", train), ("Held out", held_out)):
            print(f"{name}: {check_pairs(rows, tokenizer, args.max_length)}.")
        checkpoint = folder.checkpoint_to_resume(args)
        folder.record(settings, tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"dpo.py: {error}")

    stream = torch.tensor(tokenizer(text)["input_ids"])

    def measure() -> dict[str, float]:
        bits = bits_per_byte(model, stream, len(text.encode()), window=256, stride=128)
        return {
            "loss": bits.value * bits.bytes / bits.tokens * math.log(2),
            **preference_accuracy(model, tokenizer, held_out, max_length=args.max_length),
        }

    before_path = folder.path / "before.json"
    if not before_path.exists():
        write_json(before_path, measure())
    before = json.loads(before_path.read_text())
    set_seed(args.seed)
    columns = ["prompt", "chosen", "rejected"]
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in train]),
        processing_class=tokenizer,
    )
    if checkpoint is None or checkpoint_step(checkpoint) < args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    else:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())
    after = measure()
    model.config.use_cache = True  # the trainer turns it off
    save_whole(trainer, folder.path)
    record = {"settings": settings, "before": before, "after": after}
    write_json(folder.path / "dpo_results.json", record)
    save_training_record(
        folder.path,
        method="DPO",
        arguments=args,
        state=trainer.state,
        data={
            "source": arguments.dataset or f"functions of the Python standard library ({', '.join(arguments.kinds)})",
            "pairs": len(train),
            "held_out_pairs": len(held_out),
            "sha256": digest_of_rows(train),
        },
        settings={name: settings[name] for name in ("beta", "loss_type", "max_length")},
        base=arguments.model,
        results=[
            result("accuracy", "held-out pairs, chosen likelier than rejected", after["all"], before["all"]),
            result("loss", "held-out plain text", after["loss"], before["loss"]),
        ],
    )
    if arguments.results is not None:
        path = Path(arguments.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), f"seed {args.seed}": record})
    for name, value in before.items():
        print(f"{name:18} {value:.4f} -> {after[name]:.4f}")
    print(f'{args.output_dir} is an official checkpoint: pipeline("text-generation", model="{args.output_dir}")')


if __name__ == "__main__":
    parser = ScriptArgumentParser((PairArguments, DPOConfig), description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-dpo",
        max_steps=150,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        warmup_steps=15,
        # The reference's log-probabilities once, beforehand; the SFT term keeps the chosen side likely
        precompute_ref_log_probs=True,
        loss_type=["sigmoid", "sft"],
        max_length=256,
        gradient_checkpointing=False,
        save_steps=50,
        save_total_limit=2,
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments = parser.parse_args_into_dataclasses()
    with RunFolder(arguments[-1].output_dir).explaining_interruption(arguments[-1]):
        main(*arguments)
