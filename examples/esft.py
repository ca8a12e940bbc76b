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

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from transformers_dsv3 import Dsv3Config, ESFTCallback, ExpertSelection, score_experts
from transformers_dsv3.data.local_paths import local_or_hub
from transformers_dsv3.data.packed_stream import HeldOutBlocks
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.data.text_stream import stream_corpus, stream_files
from transformers_dsv3.evaluation.training_record import result, save_training_record
from transformers_dsv3.files import write_json
from transformers_dsv3.training.checkpoints import checkpoint_step
from transformers_dsv3.training.expert_scores import SELECTION_FILE
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments
from transformers_dsv3.training.text_arguments import TextArguments, given_or_trained_tokenizer


@dataclass
class EsftArguments:
    """The checkpoint, how its experts are selected, and the text that must not suffer."""

    model: str = field(
        default="./dsv3-quickstart",
        metadata={"help": "An official deepseek_v3 checkpoint: a folder, or a name on the Hub."},
    )
    score: str = field(
        default="token",
        metadata={"help": "Score by how often tokens choose an expert, or by its gate.", "choices": ["token", "gate"]},
    )
    p: float | None = field(
        default=None, metadata={"help": "Share of the scores to reach. Default: 0.2 by token, 0.1 by gate."}
    )
    score_blocks: int = field(default=128, metadata={"help": "Blocks of the domain's text to score experts on."})
    general: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders of general text, of which a part is measured. Default: standard library."},
    )


def main(esft_args: EsftArguments, text_args: TextArguments, training_args: TrainingArguments) -> None:
    folder = RunFolder(training_args.output_dir)
    try:  # whatever is wrong with what was asked for, before anything is trained
        check_stream_arguments(training_args)
        config = AutoConfig.from_pretrained(local_or_hub(esft_args.model, one_of=["config.json"]))
        if not isinstance(config, Dsv3Config):
            raise ValueError(f"--model {esft_args.model} is of model type {config.model_type!r}, not deepseek_v3")
        text_args.check(config.max_position_embeddings)
        own = text_args.text or text_args.dataset
        seed = training_args.seed
        text = text_args.stream(seed, folder.path) if own else stream_corpus(python_reference(), seed)
        general = stream_files([Path(path) for path in esft_args.general] if esft_args.general else None)
        settings = {**asdict(esft_args), **text_args.settings(text), "seed": seed}
        folder.check(settings)
        tokenizer = given_or_trained_tokenizer(folder.tokenizer or esft_args.model, text, config)
        train_dataset, domain_blocks = text_args.datasets(text, tokenizer, seed)
        general_blocks = HeldOutBlocks(general, tokenizer, text_args.block_size, text_args.reset_positions)
        checkpoint = folder.checkpoint_to_resume(training_args)
        set_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(esft_args.model, dtype=torch.float32)
        if (folder.path / SELECTION_FILE).exists():
            selection = ExpertSelection.load(folder.path)
        else:
            scores = score_experts(model, islice(train_dataset, esft_args.score_blocks))
            selection = scores.select(by=esft_args.score, p=esft_args.p)
        folder.record(settings, tokenizer)
        selection.save(folder.path)
    except (ValueError, OSError) as error:
        sys.exit(f"esft.py: {error}")
    print(f"Domain: {text.source}, {text.split}. General: {general.source}, {general.split}.")

    esft = ESFTCallback(selection)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset={"domain": domain_blocks, "general": general_blocks},
        processing_class=tokenizer,
        callbacks=[StreamPosition(train_dataset), esft],
    )
    print(f"Trained by {selection.score} with p = {selection.p:g}:\n{esft.share}")
    before_path = folder.path / "before_results.json"
    if not before_path.exists():
        write_json(before_path, trainer.evaluate())
    if checkpoint is not None and checkpoint_step(checkpoint) == training_args.max_steps:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())  # only the end is left
    before = json.loads(before_path.read_text())
    parts = {"domain": text, "general": general}

    def record(after: dict[str, float]) -> None:
        losses = {name: f"eval_{name}_loss" for name in parts}
        save_training_record(
            folder.path,
            method="ESFT",
            arguments=training_args,
            state=trainer.state,
            data={**text.to_dict(), "general_text": general.to_dict()},
            block_size=text_args.block_size,
            parameters={"trained": esft.share.trained, "total": esft.share.total},
            settings={**asdict(esft_args), "selection": selection.to_dict()},
            base=esft_args.model,
            results=[result("loss", f"held-out {n} text", after[key], before[key]) for n, key in losses.items()],
        )

    folder.train_evaluate_save(trainer, checkpoint, record)

    after = json.loads((folder.path / "eval_results.json").read_text())
    for name in parts:
        values = [results[f"eval_{name}_loss"] for results in (before, after)]
        print(f"{name:8} held-out loss {values[0]:.3f} before, {values[1]:.3f} after ({values[1] - values[0]:+.3f})")
    print(f"Saved in {folder.path}, an official checkpoint: pipeline('text-generation', '{folder.path}') opens it.")


if __name__ == "__main__":
    parser = ScriptArgumentParser((EsftArguments, TextArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-esft",
        max_steps=150,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=15,
        logging_steps=10,
        save_steps=50,
        save_total_limit=2,
        # Two threads otherwise add the gradients of an embedding row in any order, and no two runs end alike.
        full_determinism=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    arguments = parser.parse_args_into_dataclasses()
    with RunFolder(arguments[-1].output_dir).explaining_interruption(arguments[-1]):
        main(*arguments)
