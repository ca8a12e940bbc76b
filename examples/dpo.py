"""Align a DeepSeek-V3 with direct preference optimisation, TRL's own trainer, on pairs made from real source code.

    transformers-dsv3 quickstart && python examples/dpo.py

teaches the quickstart's model to prefer a function's own body to one that repeats a line. The same command again,
after any interruption, goes on from the last checkpoint. Another checkpoint, your own pairs, any flag of TRL's
DPOConfig:

    python examples/dpo.py --model ./my-model --dataset ./pairs.jsonl --output_dir ./aligned --beta 0.3

A dataset has columns prompt, chosen and rejected. examples/align.md has figures. Needs `datasets`.
"""

from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg
from trl import DPOConfig, DPOTrainer

from transformers_dsv3.data.local_paths import local_or_hub
from transformers_dsv3.data.preference_pairs import CORRUPTIONS, preference_pairs
from transformers_dsv3.evaluation.held_out_text import read_texts
from transformers_dsv3.evaluation.preferences import preference_accuracy
from transformers_dsv3.evaluation.text_quality import text_loss
from transformers_dsv3.evaluation.training_record import digest_of_rows, result, save_training_record
from transformers_dsv3.files import update_json, write_json
from transformers_dsv3.training.run_folder import RunFolder, save_whole, train_from
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, exit_on_refusal


@dataclass
class PairArguments:
    """The checkpoint and the pairs."""

    model: str = HfArg(default="./dsv3-quickstart", help="An official deepseek_v3 checkpoint.")
    dataset: str | None = HfArg(
        default=None, help="A dataset's name or file with prompt, chosen, rejected. Default: functions of the library."
    )
    kinds: list[str] = HfArg(
        default_factory=lambda: ["single_quotes"],
        help=f"What is wrong in the rejected bodies: {', '.join(CORRUPTIONS)}.",
    )
    eval_pairs: int = HfArg(default=200, help="Pairs held out, of other files than the training's.")
    results: str | None = HfArg(default=None, help="A JSON file that collects the results by seed.")


def main(pair_args: PairArguments, args: DPOConfig) -> None:
    folder = RunFolder(args.output_dir)
    kept = ("seed", "beta", "loss_type", "max_steps", "max_length")
    settings = {**asdict(pair_args), **{name: getattr(args, name) for name in kept}}
    del settings["results"]
    with exit_on_refusal():  # whatever is wrong with what was asked for, before anything is trained
        folder.check(settings)
        tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer or pair_args.model)
        path = local_or_hub(pair_args.model, one_of=["config.json"])
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        number = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        pairs = preference_pairs(pair_args.dataset, pair_args.kinds, number, pair_args.eval_pairs, seed=args.seed)
        print(pairs.check(tokenizer, args.max_length))
        checkpoint = folder.checkpoint_to_resume(args)
        folder.record(settings, tokenizer)

    text = "\n".join(read_texts(None)[1])[:100_000]  # that the quickstart has not seen either

    def measure() -> dict[str, float]:
        loss = text_loss(model, tokenizer, text, window=256, stride=128)
        return {"loss": loss, **preference_accuracy(model, tokenizer, pairs.held_out, max_length=args.max_length)}

    before = folder.measured_before(measure, "before.json")
    set_seed(args.seed)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pairs.train).select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    train_from(trainer, checkpoint)
    after = measure()
    save_whole(trainer, folder.path)
    record = {"settings": settings, "before": before, "after": after}
    write_json(folder.path / "dpo_results.json", record)
    save_training_record(
        folder.path,
        method="DPO",
        arguments=args,
        state=trainer.state,
        data={**pairs.to_dict(), "sha256": digest_of_rows(pairs.train)},
        settings={name: settings[name] for name in ("beta", "loss_type", "max_length")},
        base=pair_args.model,
        results=[
            result("accuracy", "held-out pairs, chosen likelier than rejected", after["all"], before["all"]),
            result("loss", "held-out plain text", after["loss"], before["loss"]),
        ],
    )
    if pair_args.results is not None:
        update_json(pair_args.results, {f"seed {args.seed}": record})
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
        precompute_ref_log_probs=True,  # once, beforehand
        loss_type=["sigmoid", "sft"],  # the latter keeps the chosen side likely
        max_length=256,
        gradient_checkpointing=False,
        full_determinism=False,
        report_to="none",
        bf16=torch.cuda.is_available(),
    )
    parser.run(main)
