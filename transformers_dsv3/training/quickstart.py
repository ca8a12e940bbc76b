"""The quickstart's recipe: a small DeepSeek-V3 trained from scratch with Transformers' own `Trainer`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import transformers_dsv3  # noqa: F401  registers the plugin's classes with the Auto classes

from ..data.byte_bpe import TokenBlocks, token_stream, train_byte_bpe
from ..data.text_files import Corpus, TextError
from .checkpoints import move_in
from .load_balancing import LoadBalancingCallback
from .mtp_objective import MtpObjectiveCallback
from .quickstart_run import QuickstartSettings, Run, checkpoint_step, latest_checkpoint, record_run, training_folder


# It does most for batches as small as these; see examples/pretrain.md
BALANCE_LOSS_WEIGHT = 0.1


@dataclass(frozen=True)
class TrainingOutcome:
    """What one command trained: `steps` optimizer steps on `tokens` tokens in `seconds` (0 where all was done).

    `arguments` and `state` are the trainer's; the state's log is of all commands.
    """

    steps: int
    tokens: int
    seconds: float
    parameters: int
    active_parameters: int
    arguments: TrainingArguments
    state: TrainerState


class LiveLossBar(ProgressCallback):
    """A progress bar with the running loss and utilisation behind it, in place of a line for every log entry."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        self.training_bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(
                loss=f"{float(logs['loss']):.3f}", utilisation=f"{float(logs['router/utilisation']):.0%}"
            )


@contextmanager
def quiet_saving() -> Iterator[None]:
    """No bar for each checkpoint, and no report of the MTP layers' copies of embedding and head when resuming."""
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def quickstart_tokenizer(output: Path, corpus: Corpus, settings: QuickstartSettings) -> PreTrainedTokenizerFast:
    """The tokenizer of the folder's recorded run, or a new one trained on the training part of the text.

    Nothing is written: a tokenizer without a record would say of no text that it belongs to it.
    """
    kept = training_folder(output) / "tokenizer"
    if kept.is_dir() and (training_folder(output) / "run.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(kept)
    return train_byte_bpe(
        (document.text for document in corpus.train),
        settings.vocab_size,
        model_max_length=settings.model["max_position_embeddings"],
    )


def record_run_and_tokenizer(output: Path, run: Run, tokenizer: PreTrainedTokenizerFast) -> None:
    kept, partial = (training_folder(output) / name for name in ("tokenizer", "tokenizer.partial"))
    if not (training_folder(output) / "run.json").exists():
        shutil.rmtree(kept, ignore_errors=True)
    # The record first: a tokenizer that is missing beside it is trained again on the same text.
    record_run(output, run)
    if not kept.is_dir():
        tokenizer.save_pretrained(partial)
        partial.replace(kept)


def train_and_save(output: Path, run: Run, corpus: Corpus, settings: QuickstartSettings) -> TrainingOutcome:
    """Train up to `run.target_step` from the folder's latest checkpoint, and save the official checkpoint.

    The result depends on the text, the settings and the seed only: stopping at any moment and running again ends
    at the same weights as a run without a stop.

    Raises:
        TextError: the text makes less than one block of tokens; nothing is written then.
    """
    tokenizer = quickstart_tokenizer(output, corpus, settings)
    stream = token_stream(tokenizer, [document.text for document in corpus.train])
    if stream.numel() < settings.block_length:
        raise TextError(
            f"{corpus.source} makes only {stream.numel()} tokens, fewer than one block of {settings.block_length}: "
            "it repeats itself too much to learn from"
        )
    blocks = TokenBlocks(stream, settings.block_length)
    # Only now, because a record ties the folder to this text.
    record_run_and_tokenizer(output, run, tokenizer)
    checkpoint = latest_checkpoint(output)
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    set_seed(run.seed)
    if checkpoint is None:
        model = AutoModelForCausalLM.from_config(quickstart_config(settings, tokenizer))
    else:  # also where every step was done when the command was stopped, and only saving is left
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seconds = 0.0
    arguments = training_arguments(output, run, settings)
    if checkpoint is not None and done == run.target_step:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=blocks,
            processing_class=tokenizer,
            callbacks=[LoadBalancingCallback(seq_aux_loss_weight=BALANCE_LOSS_WEIGHT), MtpObjectiveCallback()],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LiveLossBar())
        started = time.perf_counter()
        with quiet_saving():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
        state = trainer.state
    model.config.use_cache = True  # the trainer turns it off
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        max_new_tokens=64,
    )
    save_checkpoint(output, model, tokenizer)
    steps = max(run.target_step - done, 0)
    return TrainingOutcome(
        steps=steps,
        tokens=steps * settings.batch_size * settings.block_length,
        seconds=seconds,
        parameters=model.num_parameters(),
        active_parameters=model.config.active_parameters + model.config.active_mtp_parameters,
        arguments=arguments,
        state=state,
    )


def quickstart_config(settings: QuickstartSettings, tokenizer: PreTrainedTokenizerBase) -> Any:
    return AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings.model,
    )


def training_arguments(output: Path, run: Run, settings: QuickstartSettings) -> TrainingArguments:
    span = run.target_step - run.start_step
    return TrainingArguments(
        output_dir=str(training_folder(output)),
        max_steps=run.target_step,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        # A constant rate with a decay at the end, not one curve over all steps: a later command then trains on at
        # the full rate and decays over its own last steps.
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=min(settings.warmup_steps, span),
        lr_scheduler_kwargs={
            "num_decay_steps": min(int(settings.decay_share * span), max(span - settings.warmup_steps, 0)),
            "decay_type": "linear",
        },
        logging_steps=5,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=run.seed,
        data_seed=run.seed,
        # Two threads otherwise add the gradients of one embedding row in any order. Costs nothing on a CPU; on a GPU
        # some operations have no deterministic form.
        full_determinism=not torch.cuda.is_available(),
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def save_checkpoint(output: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put model, tokenizer and generation config into the folder, whole."""
    partial = training_folder(output) / "saving.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    move_in(partial, output)
