"""Continue pre-training any official deepseek_v3 checkpoint on text that is streamed from files or from any dataset.

    python examples/continue_pretraining.py --model ./dsv3-pretrain --text ./my-code --output_dir ./dsv3-continued

The same command again, after any interruption, goes on from the last checkpoint. It takes every flag of
TrainingArguments: for larger models --gradient_checkpointing, --bf16, --fsdp. examples/pretrain.md says more.
Needs `datasets`.
"""

from dataclasses import asdict, dataclass

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback
from transformers_dsv3.data.local_paths import local_or_hub
from transformers_dsv3.evaluation.training_record import held_out_results, save_training_record
from transformers_dsv3.training.held_out_metrics import BitsPerByteMetric, nats_of_rows
from transformers_dsv3.training.model_arguments import read_config
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, check_reporting, exit_on_refusal
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments
from transformers_dsv3.training.text_arguments import CorpusArguments, given_or_trained_tokenizer


@dataclass
class ModelArguments:
    """The checkpoint, and what is trained beside next-token prediction."""

    model: str = HfArg(help="An official deepseek_v3 checkpoint: a folder, or a name on the Hub.")
    tokenizer: str | None = HfArg(default=None, help="Default: the checkpoint's own.")
    bias_update_rate: float = HfArg(
        default=1e-3, help="How far a router's bias moves a step to follow the text's needs. 0: not at all."
    )
    mtp_weight: float = HfArg(
        default=0.1, help="Weight of the multi-token prediction loss, if there are MTP layers. 0: untrained."
    )


def main(model_args: ModelArguments, text_args: CorpusArguments, args: TrainingArguments) -> None:
    folder, say = RunFolder(args.output_dir), PartialState().on_main_process(print)
    with exit_on_refusal():  # whatever is wrong with what was asked for, before anything is trained
        check_stream_arguments(args)
        check_reporting(args)
        model_args.model = local_or_hub(model_args.model, one_of=["config.json"])
        config = read_config(model_args.model)
        text_args.check(config.max_position_embeddings)
        text = text_args.stream(args.seed, exclude=folder.path, run=args)
        settings = {**asdict(model_args), **text_args.settings(text), "seed": args.seed}
        folder.check(settings)
        if folder.is_finished(args):
            return say(f"{folder.path} is finished, at step {args.max_steps:,}: more --max_steps train it on.")
        with args.main_process_first():
            name = folder.tokenizer or model_args.tokenizer or model_args.model
            tokenizer = given_or_trained_tokenizer(name, text, config)
            train_dataset, eval_dataset = text_args.datasets(text, tokenizer, args.seed)
            checkpoint = folder.checkpoint_to_resume(args)
            folder.record(settings, tokenizer)
    say(f"Text: {text.source}, {text.split}. From {checkpoint or model_args.model}.")

    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(model_args.model, dtype=torch.float32)
    callbacks = [StreamPosition(train_dataset), LoadBalancingCallback(model_args.bias_update_rate)]
    if model_args.mtp_weight and config.num_nextn_predict_layers:
        callbacks.append(MtpObjectiveCallback(model_args.mtp_weight, final_weight=model_args.mtp_weight))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        preprocess_logits_for_metrics=nats_of_rows,
        compute_metrics=BitsPerByteMetric(eval_dataset.bytes_per_token, eval_dataset.groups),
    )

    def record(metrics: dict[str, float]) -> None:
        save_training_record(
            folder.path,
            method="continued pre-training",
            arguments=args,
            state=trainer.state,
            data=text.to_dict(),
            block_size=text_args.block_size,
            settings=asdict(model_args),
            base=model_args.model,
            results=held_out_results(metrics),
        )

    folder.train_evaluate_save(trainer, checkpoint, record)
    say(f"Saved in {folder.path}, an official checkpoint, which AutoModelForCausalLM and pipeline open.")


if __name__ == "__main__":
    parser = ScriptArgumentParser((ModelArguments, CorpusArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-continued",
        max_steps=500,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        warmup_steps=0.1,  # below 1, a share of the run
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_steps=100,
        eval_strategy="steps",
    )
    parser.run(main)
