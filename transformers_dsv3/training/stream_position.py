"""The place in a stream of training data, kept in the trainer's checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..data.mixture import MixedStream
from ..data.packed_stream import PackedStream


def check_stream_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that do not fit an endless stream or resuming, and set `ignore_data_skip`.

    Raises:
        ValueError: naming the argument.
    """
    if args.max_steps <= 0:
        raise ValueError("--max_steps must be given: a stream has no end to count epochs by")
    if args.save_only_model:
        raise ValueError("--save_only_model leaves out of the checkpoints what resuming needs")
    if args.dataloader_num_workers > 1:
        raise ValueError(f"--dataloader_num_workers {args.dataloader_num_workers}: the stream is read by one at most")
    if args.accelerator_config.split_batches:
        raise ValueError("--accelerator_config: split_batches is not supported, batches are those of each process")
    args.ignore_data_skip = True  # `StreamPosition` is in its place


class StreamPosition(TrainerCallback, ExportableState):
    """Sends a stream of blocks to the one after the last that a resumed checkpoint was trained on.

    The trainer's own way is to read everything up to there again, and it loses count where a stream was read to its
    end and begun anew. Needs `ignore_data_skip=True`, so that only one of the two skips.

    The position is in `trainer_state.json`, which is the last file of a checkpoint: both are there or neither is. Of a
    mixture the logs tell tokens and passes of each domain.
    """

    def __init__(self, stream: PackedStream | MixedStream):
        self.stream = stream
        self.block = 0
        self.blocks_per_step = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"position": self.stream.state_dict(self.block)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.ignore_data_skip:
            raise ValueError("StreamPosition needs ignore_data_skip=True: otherwise the trainer skips as well")
        # What data loaders read ahead does not count, so the position follows the steps.
        self.blocks_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.global_step:
            try:
                position = state.stateful_callbacks[type(self).__name__]["attributes"]["position"]
            except (KeyError, TypeError):
                raise ValueError("the checkpoint has no position in the training data: it is of another run") from None
            self.stream.load_state_dict(position)
            self.block = position["block"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.block += self.blocks_per_step
        # Without its own skipping the trainer counts epochs from where it was resumed.
        state.epoch = state.global_step / state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if isinstance(self.stream, MixedStream) and "loss" in logs:
            figures = {f"mixture/{name}_tokens": count for name, count in self.stream.tokens(self.block).items()}
            figures |= {f"mixture/{name}_epochs": count for name, count in self.stream.epochs.items()}
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)
