"""What is asked of a pipeline, and what of it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...option_error import OptionError
from .kinds import SCHEDULES, ScheduleKind, rank_of_stage


@dataclass
class PipelineArguments:
    """How [`PipelineTrainer`] trains a model as a pipeline; for `HfArgumentParser` too. See examples/pipeline.md.

    Args:
        schedule: one of `SCHEDULES`.
        microbatches: parts of a batch of `per_device_train_batch_size` rows, which are in the pipeline at once.
        stages_per_rank: stages of each process, by default what the schedule takes, or 2.
        cut: where stages begin. "cost" for stages of about equal cost, between the halves of a layer too, and between
            head and MTP layers; "layers" for equal numbers of layers; or the places themselves, such as "3,6.5", a
            half being between attention and network.
        pipeline_timeout: seconds that a process waits for another one before it fails.

    Raises:
        OptionError: for values that no model could have, naming the field.
    """

    schedule: str = field(
        default="1F1B",
        metadata={"help": "Order of forward and backward passes.", "choices": list(SCHEDULES)},
    )
    microbatches: int = field(
        default=8,
        metadata={"help": "Parts of a batch of per_device_train_batch_size rows that are in the pipeline at once."},
    )
    stages_per_rank: int | None = field(
        default=None,
        metadata={"help": "Stages of each process: 2 or more for Interleaved1F1B and InterleavedZeroBubble (2)."},
    )
    cut: str = field(
        default="cost",
        metadata={
            "help": "Where stages begin: 'cost' for stages of about equal cost, between the halves of a layer too; "
            "'layers' for equal numbers of layers; or the places themselves, such as '3,6.5', a half being between "
            "attention and network."
        },
    )
    pipeline_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that a process waits for another one before it fails."},
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise OptionError("schedule", f"`schedule={self.schedule!r}`: must be one of {', '.join(SCHEDULES)}")
        needed, takes_more = self.kind.stages_per_rank, self.kind.takes_more
        if self.stages_per_rank is None:
            self.stages_per_rank = needed
        elif takes_more and self.stages_per_rank < needed:
            raise OptionError(
                "stages_per_rank", f"`stages_per_rank={self.stages_per_rank}`: {self.schedule} needs {needed} or more"
            )
        elif not takes_more and self.stages_per_rank != needed:
            raise OptionError(
                "stages_per_rank",
                f"`stages_per_rank={self.stages_per_rank}`: {self.schedule} takes {needed} of each process",
            )
        if self.microbatches < 1:
            raise OptionError("microbatches", f"`microbatches={self.microbatches}`: at least 1 is needed")
        if not self.pipeline_timeout > 0:
            raise OptionError("pipeline_timeout", f"`pipeline_timeout={self.pipeline_timeout}`: must be above 0")

    @property
    def kind(self) -> ScheduleKind:
        return SCHEDULES[self.schedule]

    def num_stages(self, ranks: int) -> int:
        assert self.stages_per_rank is not None  # by __post_init__
        return ranks * self.stages_per_rank

    def rank_of(self, stage: int, ranks: int) -> int:
        """The rank that a stage is on."""
        return rank_of_stage(self.schedule, ranks, stage)

    def check(self, config: Any, ranks: int, batch_size: int) -> None:
        """Refuses what does not fit a model, a number of processes and a batch.

        Raises:
            OptionError: naming the field and the rule.
        """
        if ranks < 2:
            raise OptionError(
                "pipeline",
                "A pipeline needs several processes: `torchrun --nproc_per_node 2 SCRIPT`, or use `Trainer`.",
            )
        stages, layers = self.num_stages(ranks), config.num_hidden_layers
        if stages > layers:
            raise OptionError(
                "schedule",
                f"{stages} stages ({ranks} processes, `stages_per_rank={self.stages_per_rank}`) are more than the "
                f"model's {layers} layers (`num_hidden_layers`)",
            )
        if batch_size % self.microbatches:
            raise OptionError(
                "microbatches",
                f"`per_device_train_batch_size={batch_size}` must be a multiple of `microbatches={self.microbatches}`",
            )
        if self.microbatches < self.kind.least * stages:
            raise OptionError(
                "microbatches",
                f"`microbatches={self.microbatches}`: {self.schedule} needs at least one for each of {stages} stages",
            )
        rounds = max(1, self.microbatches // ranks)
        if self.kind.takes_more and self.microbatches % rounds:
            raise OptionError(
                "microbatches",
                f"`microbatches={self.microbatches}`: {self.schedule} on {ranks} processes needs a multiple of "
                f"{rounds}, its number of rounds",
            )


# Fields of TrainingArguments that a pipeline cannot honour, and what they are when nothing was asked for
_NOT_TAKEN = {
    "fp16": "train in bf16",
    "fsdp": "weights are not sharded within a stage",
    "deepspeed": "stages are PyTorch's",
    "torch_compile": "stages are not compiled",
    "label_smoothing_factor": "the loss is the model's own",
    "neftune_noise_alpha": "there is no hook on an embedding that only some processes have",
    "auto_find_batch_size": "processes would not agree on another batch size",
    "fp16_full_eval": "a stage keeps its dtype",
    "bf16_full_eval": "a stage keeps its dtype",
    "push_to_hub": "upload the saved folder by `transformers_dsv3.push_to_hub`",
}


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuses settings of `Trainer` that a pipeline would pass over.

    Raises:
        OptionError: naming the field.
    """
    for name, reason in _NOT_TAKEN.items():
        if getattr(args, name, None):
            raise OptionError(name, f"`{name}={getattr(args, name)!r}` does not go together with a pipeline: {reason}")
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        raise OptionError(
            "include_num_input_tokens_seen", "`include_num_input_tokens_seen`: each stage would count the same tokens"
        )
    if args.n_gpu > 1:
        raise OptionError("pipeline", f"{args.n_gpu} GPUs in one process: start one process for each by `torchrun`")
    if args.parallelism_config is not None:
        raise OptionError(
            "parallelism_config", "`parallelism_config` does not go together with a pipeline, which has all processes"
        )
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise OptionError(
            "train_sampling_strategy",
            "`batch_rebalance` gives each process rows of its own; stages need the same ones",
        )
