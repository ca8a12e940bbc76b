"""What is asked of a pipeline, and what of it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import TrainingArguments

from ...option_error import OptionError


class ScheduleKind(NamedTuple):
    """A schedule of `torch.distributed.pipelining`.

    Attributes:
        class_name: in `torch.distributed.pipelining.schedules`.
        stages_per_rank: how many it takes of each rank; None for as many as are asked for.
        is_v: whether stages come back to the first rank (rank r has r and 2p - 1 - r), or go round (r, p + r, ...).
        least: fewest microbatches, in stages.
        splits_backward: whether the gradients of weights are computed apart from those of inputs.
    """

    class_name: str
    stages_per_rank: int | None
    is_v: bool
    least: int
    splits_backward: bool


SCHEDULES = {
    "GPipe": ScheduleKind("ScheduleGPipe", 1, False, 0, False),
    "1F1B": ScheduleKind("Schedule1F1B", 1, False, 1, False),
    "Interleaved1F1B": ScheduleKind("ScheduleInterleaved1F1B", None, False, 0, False),
    "InterleavedZeroBubble": ScheduleKind("ScheduleInterleavedZeroBubble", None, False, 0, True),
    "ZBV": ScheduleKind("ScheduleZBVZeroBubble", 2, True, 0, True),
    "DualPipeV": ScheduleKind("ScheduleDualPipeV", 2, True, 1, True),
}


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
        fixed = SCHEDULES[self.schedule].stages_per_rank
        if self.stages_per_rank is None:
            self.stages_per_rank = fixed or 2
        elif fixed is None and self.stages_per_rank < 2:
            raise OptionError(
                "stages_per_rank", f"`stages_per_rank={self.stages_per_rank}`: {self.schedule} needs 2 or more"
            )
        elif fixed is not None and self.stages_per_rank != fixed:
            raise OptionError(
                "stages_per_rank",
                f"`stages_per_rank={self.stages_per_rank}`: {self.schedule} takes {fixed} of each process",
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
        if self.kind.is_v:
            return stage if stage < ranks else 2 * ranks - 1 - stage
        return stage % ranks

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
        if self.kind.stages_per_rank is None and self.microbatches % rounds:
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
