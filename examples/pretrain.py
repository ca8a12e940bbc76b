"""Pre-train a DeepSeek-V3 from scratch on text that is streamed from files or from any dataset.

    python examples/pretrain.py --output_dir ./dsv3-pretrain

trains a model of 10 M parameters on the source of Python's standard library. The same command again, after any
interruption, goes on from the last checkpoint and ends at the same weights. Your own text, another size, any flag of
TrainingArguments:

    python examples/pretrain.py --output_dir ./my-model --text ./notes ./src --block_size 512 \\
        --config_overrides hidden_size=512,num_hidden_layers=8 --max_steps 20000 --report_to tensorboard

examples/pretrain.md says what to expect, examples/parallel.md how to train on several processes. Needs `datasets`.
"""

import sys
from dataclasses import asdict, dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from transformers_dsv3 import Dsv3Config, LoadBalancingCallback, MtpObjectiveCallback
from transformers_dsv3.data.local_paths import local_or_hub
from transformers_dsv3.evaluation.training_record import result, save_training_record
from transformers_dsv3.training.checkpoints import checkpoint_step
from transformers_dsv3.training.held_out_metrics import BitsPerByteMetric, nats_of_rows
from transformers_dsv3.training.parallel import ParallelArguments, distribute
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, check_reporting, override_config
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments
from transformers_dsv3.training.text_arguments import TextArguments, given_or_trained_tokenizer


@dataclass
class ModelArguments:
    """The model, and what is trained beside next-token prediction."""

    config: str | None = field(
        default=None,
        metadata={"help": "A config.json of model type deepseek_v3, or a folder with one. Default: 10 M parameters."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields to change in it, as in hidden_size=512,n_routed_experts=32,num_hidden_layers=8."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "A tokenizer's folder or name. Default: a byte-level BPE trained on the first of the text."},
    )
    bias_update_rate: float | None = field(
        default=None,
        metadata={"help": "How far a router's bias moves a step, so that all experts are used. 0: not at all."},
    )
    seq_aux_loss_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the sequence-wise balance loss. DeepSeek-V3, at its size, had 0.0001."},
    )
    mtp_weight: float = field(
        default=0.3,
        metadata={"help": "Weight of the multi-token prediction loss; it falls to a third at the end. 0: untrained."},
    )


def make_config(arguments: ModelArguments) -> Dsv3Config:
    if arguments.config is None:
        settings = QuickstartSettings()
        fields = {name: value for name, value in settings.model.items() if name != "mtp_loss_weight"}
        config = Dsv3Config(vocab_size=settings.vocab_size, **fields)
    else:
        config = AutoConfig.from_pretrained(local_or_hub(arguments.config, one_of=["config.json"]))
        if not isinstance(config, Dsv3Config):
            raise ValueError(f"--config {arguments.config} is of model type {config.model_type!r}, not deepseek_v3")
    if arguments.config_overrides:
        override_config(config, arguments.config_overrides)
    config.check_fields()
    return config


def main(
    model_args: ModelArguments,
    text_args: TextArguments,
    parallel_args: ParallelArguments,
    training_args: TrainingArguments,
) -> None:
    folder = RunFolder(training_args.output_dir)
    is_main_process = training_args.process_index == 0
    try:  # whatever is wrong with what was asked for, before anything is trained
        check_stream_arguments(training_args)
        check_reporting(training_args)
        parallel_args.prepare(training_args)
        config = make_config(model_args)
        text_args.check(config.max_position_embeddings)
        text = text_args.stream(training_args.seed, exclude=folder.path)
        settings = {**asdict(model_args), **text_args.settings(text), "seed": training_args.seed}
        folder.check(settings)
        if folder.is_finished(training_args):
            if is_main_process:
                print(f"{folder.path} is finished, at step {training_args.max_steps:,}: more --max_steps train it on.")
            return
        with training_args.main_process_first():
            tokenizer = given_or_trained_tokenizer(folder.tokenizer or model_args.tokenizer, text, config)
            train_dataset, eval_dataset = text_args.datasets(text, tokenizer, training_args.seed)
            checkpoint = folder.checkpoint_to_resume(training_args)
            folder.record(settings, tokenizer)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"pretrain.py: {error}")
    if is_main_process:
        print(f"Text: {text.source}, {text.split}. From {checkpoint or 'a new model'}.")

    if model_args.config is None:
        config.vocab_size = len(tokenizer)  # a small text does not have as many distinct pieces as were asked for
    config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    set_seed(training_args.seed)
    if checkpoint is not None and checkpoint_step(checkpoint) == training_args.max_steps:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)  # only the end is left to do
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = distribute(model, parallel_args.distributed_config())
    balancing = LoadBalancingCallback(model_args.bias_update_rate, seq_aux_loss_weight=model_args.seq_aux_loss_weight)
    callbacks = [StreamPosition(train_dataset), balancing]
    if model_args.mtp_weight and config.num_nextn_predict_layers:
        callbacks.append(MtpObjectiveCallback(model_args.mtp_weight, final_weight=model_args.mtp_weight / 3))
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        preprocess_logits_for_metrics=nats_of_rows,
        compute_metrics=BitsPerByteMetric(eval_dataset.bytes_per_token),
    )

    def record(metrics: dict[str, float]) -> None:
        save_training_record(
            folder.path,
            method="pre-training",
            arguments=training_args,
            state=trainer.state,
            data=text.to_dict(),
            block_size=text_args.block_size,
            settings=asdict(model_args),
            results=[result(name, "held-out text", metrics[f"eval_{name}"]) for name in ("bits_per_byte", "loss")],
        )

    folder.train_evaluate_save(trainer, checkpoint, record)
    if is_main_process:
        print(f"Saved in {folder.path}, an official checkpoint, which AutoModelForCausalLM and pipeline open.")


if __name__ == "__main__":
    parser = ScriptArgumentParser(
        (ModelArguments, TextArguments, ParallelArguments, TrainingArguments), description=__doc__
    )
    parser.set_defaults(
        output_dir="./dsv3-pretrain",
        max_steps=500,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=0.1,  # below 1, a share of the run
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        save_steps=50,
        eval_steps=100,
        eval_strategy="steps",
        save_total_limit=2,
        # Two threads otherwise add the gradients of an embedding row in any order, and no two runs end alike.
        full_determinism=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # else several processes would each train by themselves
    )
    arguments = parser.parse_args_into_dataclasses()
    with RunFolder(arguments[-1].output_dir).explaining_interruption(arguments[-1]):
        main(*arguments)
