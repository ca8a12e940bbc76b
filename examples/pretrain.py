"""Pre-train a DeepSeek-V3 from scratch on text that is streamed from files or from any dataset.

    python examples/pretrain.py --output_dir ./dsv3-pretrain

trains a model of 10 M parameters on the source of Python's standard library. The same command again, after any
interruption, goes on from the last checkpoint and ends at the same weights. Your own text, another size, any flag of
TrainingArguments:

    python examples/pretrain.py --output_dir ./my-model --text ./notes ./src --block_size 512 \\
        --config_overrides hidden_size=512,num_hidden_layers=8 --max_steps 20000 --report_to tensorboard

examples/pretrain.md says what to expect, examples/parallel.md how to train on several processes. Needs `datasets`.
"""

from dataclasses import asdict, dataclass

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback, distribute
from transformers_dsv3.evaluation.training_record import held_out_results, save_training_record
from transformers_dsv3.training.held_out_metrics import BitsPerByteMetric, nats_of_rows
from transformers_dsv3.training.model_arguments import NewModelArguments
from transformers_dsv3.training.parallel import ParallelArguments
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, check_reporting, exit_on_refusal
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments
from transformers_dsv3.training.text_arguments import CorpusArguments, given_or_trained_tokenizer


@dataclass
class ModelArguments(NewModelArguments):
    """The model, and what is trained beside next-token prediction."""

    bias_update_rate: float | None = HfArg(
        default=None, help="How far a router's bias moves a step, so that all experts are used. 0: not at all."
    )
    seq_aux_loss_weight: float = HfArg(
        default=0.1, help="Weight of the sequence-wise balance loss. DeepSeek-V3, at its size, had 0.0001."
    )
    mtp_weight: float = HfArg(
        default=0.3, help="Weight of the multi-token prediction loss; it falls to a third at the end. 0: untrained."
    )


def main(
    model_args: ModelArguments, text_args: CorpusArguments, parallel_args: ParallelArguments, args: TrainingArguments
) -> None:
    folder, say = RunFolder(args.output_dir), PartialState().on_main_process(print)
    with exit_on_refusal():  # whatever is wrong with what was asked for, before anything is trained
        check_stream_arguments(args)
        check_reporting(args)
        parallel_args.prepare(args)
        config = model_args.make_config()
        text_args.check(config.max_position_embeddings)
        text = text_args.stream(args.seed, exclude=folder.path, run=args)
        settings = {**asdict(model_args), **text_args.settings(text), "seed": args.seed}
        folder.check(settings)
        if folder.is_finished(args):
            return say(f"{folder.path} is finished, at step {args.max_steps:,}: more --max_steps train it on.")
        with args.main_process_first():
            tokenizer = given_or_trained_tokenizer(folder.tokenizer or model_args.tokenizer, text, config)
            train_dataset, eval_dataset = text_args.datasets(text, tokenizer, args.seed)
            checkpoint = folder.checkpoint_to_resume(args)
            folder.record(settings, tokenizer)
    say(f"Text: {text.source}, {text.split}. From {checkpoint or 'a new model'}.")

    if model_args.config is None:
        config.vocab_size = len(tokenizer)  # a small text does not have as many distinct pieces as were asked for
    config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    set_seed(args.seed)
    new_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    balancing = LoadBalancingCallback(model_args.bias_update_rate, seq_aux_loss_weight=model_args.seq_aux_loss_weight)
    callbacks = [StreamPosition(train_dataset), balancing]
    if model_args.mtp_weight and config.num_nextn_predict_layers:
        callbacks.append(MtpObjectiveCallback(model_args.mtp_weight, final_weight=model_args.mtp_weight / 3))
    trainer = Trainer(
        model=distribute(new_model, parallel_args.distributed_config()),
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
            method="pre-training",
            arguments=args,
            state=trainer.state,
            data=text.to_dict(),
            block_size=text_args.block_size,
            settings=asdict(model_args),
            results=held_out_results(metrics),
        )

    folder.train_evaluate_save(trainer, checkpoint, record)
    say(f"Saved in {folder.path}, an official checkpoint, which AutoModelForCausalLM and pipeline open.")


if __name__ == "__main__":
    dataclasses = (ModelArguments, CorpusArguments, ParallelArguments, TrainingArguments)
    parser = ScriptArgumentParser(dataclasses, description=__doc__)
    parser.set_defaults(
        output_dir="./dsv3-pretrain",
        max_steps=500,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=0.1,  # below 1, a share of the run
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_steps=100,
        eval_strategy="steps",
    )
    parser.run(main)
