"""`Trainer` for models that are cut into the stages of a pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ...option_error import OptionError
from .agreement import check_agreement, check_batches, check_model
from .arguments import PipelineArguments, check_training_arguments
from .checkpoint import load_optimizer, save_optimizer, whole_state_dict
from .pipeline import Pipeline


logger = logging.get_logger(__name__)

SCHEDULER_FILE = "scheduler.pt"


class LocalModel(nn.Module):
    """What `Trainer` wraps the model in: nothing is computed by calling it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("A process of a pipeline has some layers of the model only, which cannot be called.")


class PipelineTrainer(Trainer):
    """Transformers' `Trainer`, with the model cut into stages over all processes.

    ```python
    # torchrun --nproc_per_node 2 train.py
    trainer = PipelineTrainer(
        model=model, args=args, train_dataset=data, pipeline=PipelineArguments(schedule="1F1B", microbatches=8)
    )
    ```

    Every process makes the same model, of which it keeps its stages when training or evaluation begins, and reads the
    same rows. `per_device_train_batch_size` is the batch of the whole pipeline. Losses, gradient norms, weights and
    correction biases are those of `Trainer` in one process; `save_model` and checkpoints write one official
    checkpoint, and the optimizer's state resumes under another schedule, cut or number of processes.

    Args:
        model: a `DeepseekV3ForCausalLM`, whole, the same on every process.
        args: `TrainingArguments`; what a pipeline cannot honour is refused.
        pipeline: the schedule, the microbatches and the cut, a [`PipelineArguments`].
        kwargs: the other arguments of `Trainer`.

    Raises:
        OptionError: a ValueError, before anything is sent, that names what does not go together or does not divide.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        pipeline: PipelineArguments | None = None,
        **kwargs: Any,
    ):
        if args is None:
            raise OptionError("args", "PipelineTrainer needs `args`, a TrainingArguments.")
        self.pipeline_arguments = pipeline or PipelineArguments()
        self.pipeline: Pipeline | None = None
        check_training_arguments(args)
        check_model(model)
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "model_init"):
            if kwargs.get(name) is not None:
                raise OptionError(
                    name, f"`{name}` does not go together with a pipeline, whose last stage gives the loss"
                )
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and args.world_size == 1:
            raise OptionError(
                "use_cpu", f"{started} processes were started, but each would train by itself: set `use_cpu=True`"
            )
        self.pipeline_arguments.check(model.config, args.world_size, args.per_device_train_batch_size)
        super().__init__(model, args, **kwargs)

    # ---- The pipeline

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing yet: only the stages of this process will be moved."""

    def start_pipeline(self) -> Pipeline:
        """Cuts the model, the first time. Called by all processes.

        Raises:
            ValueError: where processes were given different settings or models.
        """
        if self.pipeline is None:
            timeout = timedelta(seconds=self.pipeline_arguments.pipeline_timeout)
            group = dist.new_group(timeout=timeout)
            check_agreement(self.pipeline_arguments, self.args, self.model, group)
            autocast = torch.bfloat16 if self.args.bf16 else None
            self.pipeline = Pipeline(self.model, self.pipeline_arguments, group, self.args.device, autocast)
            if self.args.should_log:
                logger.info(f"Stages of the pipeline, {self.pipeline_arguments.schedule}:\n{self.pipeline.table}")
        return self.pipeline

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.start_pipeline()
        if self.optimizer is None:
            super().create_optimizer(_OnlyHere(self.model))
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        self.start_pipeline()
        return model if isinstance(model, LocalModel) else LocalModel(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        pipeline = self.start_pipeline()
        model.train()
        inputs = self._prepare_inputs(inputs)
        items = torch.as_tensor(num_items_in_batch, device=self.args.device)
        loss = pipeline.train_step(inputs, items)
        if self.accelerator.sync_gradients:
            pipeline.sum_shared_gradients()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, None, None]:
        """The loss alone: logits stay on the last stage."""
        pipeline = self.start_pipeline()
        check_batches(self.model, [inputs], 1, pipeline.group)
        inputs = self._prepare_inputs(inputs)
        rows = max(1, self.args.per_device_eval_batch_size // self.pipeline_arguments.microbatches)
        targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        return pipeline.evaluate(inputs, rows, targets.ne(-100).sum()), None, None

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self.start_pipeline().clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.start_pipeline().clip_grad_norm(float("inf")) if grad_norm is None else grad_norm

    # ---- Data: the same rows on every process

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        is_stream = isinstance(dataset, IterableDataset)
        if is_training and not is_stream and not self.args.dataloader_drop_last:
            rest = len(dataset) % batch_size
            if rest % self.pipeline_arguments.microbatches:
                raise OptionError(
                    "dataloader_drop_last",
                    f"The training set of {len(dataset)} rows ends with a batch of {rest}, which "
                    f"`microbatches={self.pipeline_arguments.microbatches}` does not divide: set "
                    "`dataloader_drop_last=True`",
                )
        columns = {"description": description}
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            dataset, collator = self._remove_unused_columns(dataset, **columns), self.data_collator
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, **columns)
        options: dict[str, Any] = {}
        if not is_stream:
            options["drop_last"] = self.args.dataloader_drop_last
            sampler = sampler_fn(dataset) if sampler_fn is not None else None
            if sampler is not None:
                options["sampler"] = sampler
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            **options,
        )
        # As accelerate prepares that of one process
        settings = self.accelerator.dataloader_config
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            rng_types=[],
            dispatch_batches=False,
            use_seedable_sampler=settings.use_seedable_sampler,
            data_seed=settings.data_seed,
            non_blocking=settings.non_blocking,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        failure: Exception | None = None
        batches: list[Any] = []
        try:
            while len(batches) < num_batches:
                batches.append(next(epoch_iterator))
        except StopIteration:
            pass
        except Exception as error:  # the others would wait
            failure = error
        group = self.start_pipeline().group
        check_batches(self.model, batches, self.pipeline_arguments.microbatches, group, failure)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        number = super()._get_num_items_in_batch(batch_samples, device)
        # Trainer adds up what the processes have, which is the same
        if number is None or not self.args.average_tokens_across_devices:
            return number
        return number / self.args.world_size

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Every process has all rows: nothing is to be gathered
        self.gather_function = self._cut_to_dataset
        return super().evaluation_loop(*args, **kwargs)

    def _cut_to_dataset(self, values: torch.Tensor) -> torch.Tensor:
        """Of the last batch so many values as it has rows."""
        state = self.accelerator.gradient_state
        return values[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else values

    # ---- Figures that Trainer sums over processes

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // args.world_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.args.world_size

    # ---- Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """One official checkpoint, written by the first process. Called by all of them."""
        state_dict = whole_state_dict(self.start_pipeline())
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        dist.barrier(group=self.start_pipeline().group)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.start_pipeline(), _plain(self.optimizer), Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self.start_pipeline(), _plain(self.optimizer), Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_FILE), weights_only=True))


class _OnlyHere(nn.Module):
    """A view of a model for optimizers: the parameters whose weights are on this process."""

    def __init__(self, model: nn.Module):
        super().__init__()
        object.__setattr__(self, "model", model)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        return self.model.named_children()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name, p) for name, p in self.model.named_parameters(*args, **kwargs) if not p.is_meta)

    def parameters(self, recurse: bool = True) -> Any:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # within accelerate's
