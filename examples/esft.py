"""Specialise a mixture of experts on a domain: train only the experts that the domain's text uses (ESFT).

    transformers-dsv3 quickstart
    python examples/esft.py --model ./dsv3-quickstart --output_dir ./dsv3-esft

scores the experts on the reference documentation that comes with Python, selects the few that reach a share p of the
scores in each layer, trains these alone, and measures both the domain and general text on what was held out. The same
command again, after any interruption, goes on from the last checkpoint. Your own domain, and all flags of
TrainingArguments:

    python examples/esft.py --model ./my-model --text ./manuals --general ./notes --score gate --p 0.1

examples/esft.md says how to choose p and the score. Needs `datasets`.
"""

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import ESFTCallback, ExpertSelection, score_experts
from transformers_dsv3.data.packed_stream import HeldOutBlocks
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.data.text_stream import stream_files
from transformers_dsv3.evaluation.training_record import loss_results, save_training_record
from transformers_dsv3.training.expert_scores import SELECTION_FILE
from transformers_dsv3.training.held_out_metrics import loss_changes
from transformers_dsv3.training.model_arguments import read_config
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, exit_on_refusal
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments
from transformers_dsv3.training.text_arguments import TextArguments, given_or_trained_tokenizer


@dataclass
class EsftArguments:
    """The checkpoint, how its experts are selected, and the text that must not suffer."""

    model: str = HfArg(
        default="./dsv3-quickstart", help="An official deepseek_v3 checkpoint: a folder, or a name on the Hub."
    )
    score: Literal["token", "gate"] = HfArg(
        default="token", help="Score by how often tokens choose an expert, or by its gate."
    )
    p: float | None = HfArg(default=None, help="Share of the scores to reach. Default: 0.2 by token, 0.1 by gate.")
    score_blocks: int = HfArg(default=128, help="Blocks of the domain's text to score experts on.")
    general: list[str] | None = HfArg(
        default=None,
        help="Files or folders of general text, of which a part is measured. Default: standard library.",
    )


def main(esft_args: EsftArguments, text_args: TextArguments, args: TrainingArguments) -> None:
    folder = RunFolder(args.output_dir)
    with exit_on_refusal():  # whatever is wrong with what was asked for, before anything is trained
        check_stream_arguments(args)
        config = read_config(esft_args.model)
        text_args.check(config.max_position_embeddings)
        text = text_args.stream(args.seed, exclude=folder.path, default=python_reference())
        general = stream_files(esft_args.general)
        settings = {**asdict(esft_args), **text_args.settings(text), "seed": args.seed}
        folder.check(settings)
        tokenizer = given_or_trained_tokenizer(folder.tokenizer or esft_args.model, text, config)
        train_dataset, domain_blocks = text_args.datasets(text, tokenizer, args.seed)
        general_blocks = HeldOutBlocks(general, tokenizer, text_args.block_size, text_args.reset_positions)
        checkpoint = folder.checkpoint_to_resume(args)
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(esft_args.model, dtype=torch.float32)
        if (folder.path / SELECTION_FILE).exists():
            selection = ExpertSelection.load(folder.path)
        else:
            scores = score_experts(model, islice(train_dataset, esft_args.score_blocks))
            selection = scores.select(by=esft_args.score, p=esft_args.p)
        folder.record(settings, tokenizer)
        selection.save(folder.path)
    print(f"Domain: {text.source}, {text.split}. General: {general.source}, {general.split}.")

    esft = ESFTCallback(selection)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset={"domain": domain_blocks, "general": general_blocks},
        processing_class=tokenizer,
        callbacks=[StreamPosition(train_dataset), esft],
    )
    print(f"Trained by {selection.score} with p = {selection.p:g}:\n{esft.share}")
    before = folder.measured_before(trainer.evaluate)

    def record(after: dict[str, float]) -> None:
        save_training_record(
            folder.path,
            method="ESFT",
            arguments=args,
            state=trainer.state,
            data={**text.to_dict(), "general_text": general.to_dict()},
            block_size=text_args.block_size,
            parameters={"trained": esft.share.trained, "total": esft.share.total},
            settings={**asdict(esft_args), "selection": selection.to_dict()},
            base=esft_args.model,
            results=loss_results(before, after),
        )

    print(loss_changes(before, folder.train_evaluate_save(trainer, checkpoint, record)))
    print(f"Saved in {folder.path}, an official checkpoint: pipeline('text-generation', '{folder.path}') opens it.")


if __name__ == "__main__":
    parser = ScriptArgumentParser((EsftArguments, TextArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-esft",
        max_steps=150,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=15,
    )
    parser.run(main)
