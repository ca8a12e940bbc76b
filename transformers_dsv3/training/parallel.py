"""Training on several processes: data, tensor and expert parallelism by accelerate's and Transformers' own engines.

The plans are class attributes of the config and of the models; `from_pretrained(..., distributed_config=...)` applies
them. What is here is for models that come from no checkpoint, for command lines, and for `Trainer` on CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


class CpuParallelismConfig(ParallelismConfig):
    """accelerate's `ParallelismConfig`, also for processes on CPUs.

    `Trainer` makes one of its own for a model with `tp_size > 1`, and accelerate 1.15 refuses it there, though nothing
    behind it needs a GPU. `Trainer` fills in the sizes of what `TrainingArguments(parallelism_config=...)` is given.
    """

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)
        elif self.total_size not in (1, accelerator.num_processes):
            raise ValueError(f"{self.total_size} processes are asked for, {accelerator.num_processes} were started.")


@dataclass
class ParallelArguments:
    """How the model is divided over the processes, for `HfArgumentParser`. See examples/parallel.md."""

    tp_size: int = field(
        default=1,
        metadata={"help": "Processes that share every layer, by heads and columns. They see the same batches."},
    )
    ep_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share the experts. Each sees batches of its own; everything else is sharded over "
            "all processes by FSDP2."
        },
    )

    def distributed_config(self) -> dict[str, int] | None:
        """What `distribute` is to be given, None where neither was asked for."""
        asked = {name: size for name, size in (("tp_size", self.tp_size), ("ep_size", self.ep_size)) if size != 1}
        return asked or None

    def prepare(self, args: TrainingArguments) -> None:
        """Make training arguments fit a model that is sharded when it is made.

        Trainer cannot resume such a model, and refuses to write checkpoints that say otherwise: none are written.

        Raises:
            ValueError: where several processes were started that would each train by themselves, or too few.
        """
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and args.world_size == 1:
            raise ValueError(f"{started} processes were started, but each would train by itself: --use_cpu true")
        if started % self.tp_size or started % self.ep_size:
            raise ValueError(
                f"--tp_size {self.tp_size}, --ep_size {self.ep_size}: must divide the number of processes ({started})"
            )
        if self.distributed_config() is None and not _shards_instead_of_accelerate():
            return
        if args.parallelism_config is None and not torch.accelerator.is_available():
            args.parallelism_config = CpuParallelismConfig()
        if args.save_strategy != "no":
            if args.should_log:
                logger.warning("A sharded run cannot be resumed: only the end of it is saved.")
            args.save_strategy = "no"


def distribute(model: Model, distributed_config: Any = None) -> Model:
    """A model in memory, as `from_pretrained(..., distributed_config=...)` would give it: sharded over the processes.

    Every process builds the same whole model first, from one seed; for models too large for that, one process saves
    it, and all load it.

    Args:
        model: not sharded yet; of no use afterwards unless it is what is returned.
        distributed_config: Transformers' `DistributedConfig` or a dictionary of its fields. None for what `accelerate
            launch` was told: accelerate itself shards by FSDP on GPUs, but goes on as DDP without a word on CPUs, so
            that there Transformers shards by FSDP2. In all other cases the model is returned as it is.

    Raises:
        ValueError: for sizes that do not fit the model or the processes, from Transformers' own checks.
    """
    if distributed_config is None:
        if not _shards_instead_of_accelerate():
            return model
        distributed_config = {"fsdp_size": int(os.environ["WORLD_SIZE"])}
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        distributed_config=distributed_config,
    )


def _shards_instead_of_accelerate() -> bool:
    asked_for_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked_for_fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
