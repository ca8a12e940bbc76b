"""What is timed: one decode step on a context that is already cached, one prefill, one training step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .devices import Device
from .rounds import Turn
from .settings import BenchSettings


# Tokens of the prompt that a model is given when it has been loaded
LOADED_PROMPT = 16
# Steps of each `generate` with a static cache that are not timed: where they are compiled, a new cache has new
# addresses, for which CUDA graphs are recorded again
SETTLING_STEPS = 4


@dataclass(frozen=True)
class Workload:
    """One measurement, taken by every contender that can.

    Args:
        what: one of `settings.WHAT`.
        tokens: cached tokens a row where decoding starts, or the length of the prompts or training sequences.
        batch: rows.
        dtype: of the weights, one of `settings.DTYPES`.
    """

    what: str
    tokens: int
    batch: int
    dtype: str

    @property
    def decodes(self) -> bool:
        """Whether a unit of it is a step of decoding."""
        return self.what in ("decode", "batched", "mtp")

    @property
    def tokens_a_unit(self) -> int:
        """Tokens that a unit of it makes or takes."""
        return self.batch * (1 if self.decodes or self.what == "load" else self.tokens)

    @property
    def title(self) -> str:
        """What the table calls it."""
        size = {
            "decode": f"decode, {self.tokens:,} cached",
            "batched": f"decode, batch {self.batch}, {self.tokens:,} cached",
            "mtp": f"decode with MTP, {self.tokens:,} cached",
            "prefill": f"prefill, {self.tokens:,} tokens",
            "train": f"training step, {self.batch} x {self.tokens:,} tokens",
            "load": f"loading, and the first token after {self.tokens:,}",
        }[self.what]
        return f"{size}, {self.dtype}"


def workloads(settings: BenchSettings, dtype: str) -> list[Workload]:
    """The measurements of one dtype, shortest contexts first."""
    listed = []
    for what in settings.model_what:
        if what == "decode":
            listed += [Workload(what, context, 1, dtype) for context in sorted(settings.contexts)]
        elif what == "batched":
            listed += [Workload(what, settings.batch_context, batch, dtype) for batch in sorted(settings.batches)]
        elif what == "mtp":
            listed.append(Workload(what, min(settings.contexts), 1, dtype))
        elif what == "prefill":
            listed += [Workload(what, length, 1, dtype) for length in sorted(settings.prefill)]
        elif what == "load":
            listed.append(Workload(what, LOADED_PROMPT, 1, dtype))
        else:
            listed.append(Workload(what, settings.train_length, settings.train_batch, dtype))
    return listed


@dataclass(frozen=True)
class Inputs:
    """Tokens and latents of a workload, the same for every model that shares one configuration.

    Args:
        ids: `(B, tokens)` for prefill and training, `(B, tokens + 1)` for decoding, whose last token is not cached.
        latents: for each layer, `(B, 1, tokens, kv_lora_rank)` and `(B, 1, tokens, qk_rope_head_dim)`; empty where
            nothing is cached.
    """

    ids: torch.Tensor
    latents: list[tuple[torch.Tensor, torch.Tensor]]


def make_inputs(
    workload: Workload, config: Any, dtype: torch.dtype, seed: int, device: Device | None = None
) -> Inputs:
    """Random tokens, and random latents where a context is cached, of the deviation that RMS norm gives them.

    Filling the cache so costs nothing, where a prefill of 32k tokens would take minutes; what the cache holds does not
    change how long attention over it takes.
    """
    where = (device or Device()).torch
    generator = torch.Generator(where).manual_seed(seed)
    length = workload.tokens + int(workload.decodes)
    ids = torch.randint(2, config.vocab_size, (workload.batch, length), generator=generator, device=where)
    latents = []
    if workload.decodes:
        for _ in range(config.num_hidden_layers):
            latent, rope = (
                torch.empty(workload.batch, 1, workload.tokens, width, dtype=dtype, device=where).normal_(
                    generator=generator
                )
                for width in (config.kv_lora_rank, config.qk_rope_head_dim)
            )
            latents.append((latent, rope))
    return Inputs(ids, latents)


@torch.inference_mode()
def continue_text(model: PreTrainedModel, inputs: Inputs, text: torch.Tensor | None) -> Inputs:
    """The same with latents that the model itself computes, where what it then writes matters: MTP drafts do.

    Args:
        text: token ids `(n,)` to use, repeated, in place of random ones.
    """
    ids = inputs.ids
    if text is not None:
        ids = text.repeat(ids.shape[1] // text.numel() + 1)[: ids.shape[1]].expand_as(ids)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Inputs(ids, [(layer.keys, layer.values) for layer in cache.layers])


def filled_cache(model: PreTrainedModel, latents: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds a copy of the latents, as both implementations store them."""
    cache = DynamicCache(config=model.config)
    for layer, (latent, rope) in enumerate(latents):
        cache.update(latent, rope, layer)
    return cache


class Clock(BaseStreamer):
    """Notes when `generate` hands out tokens, and how many."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value.numel())

    def end(self) -> None:
        pass

    def seconds_a_step(self, batch: int) -> tuple[float, int]:
        """Seconds a new token of each row, and how many were timed.

        The first call brings the prompt and the second the token of the pass over it, which the clock starts from.
        """
        steps = sum(self.tokens[2:]) // batch
        return (self.times[-1] - self.times[1]) / steps, steps


class StepClock(LogitsProcessor):
    """Marks every step of `generate` on the device itself, and makes neither host nor device wait.

    A streamer would: it is handed tokens in the host's memory.
    """

    def __init__(self, device: Device):
        self.device = device
        self.marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.device.mark())
        return scores

    def seconds_a_step(self, skipped: int) -> tuple[float, int]:
        """Seconds of a step, and how many were timed: all but the prompt's and the first few after it."""
        steps = self.device.seconds_between(self.marks)[skipped:]
        return sum(steps) / len(steps), len(steps)


def decode(
    model: PreTrainedModel,
    inputs: Inputs,
    new_tokens: int,
    use_mtp: bool = False,
    device: Device | None = None,
    static: bool = False,
) -> Turn:
    """Greedy `generate`, timed a token after the first.

    Args:
        new_tokens: tokens that are timed.
        static: `cache_implementation="static"`, from the prompt on; on a GPU Transformers compiles the steps, which
            replay CUDA graphs then. Otherwise from a cache that is full already.
    """
    device = device or Device()
    options: dict[str, Any] = {"use_mtp": True} if use_mtp else {}
    if static:
        options["cache_implementation"] = "static"
    else:
        options["past_key_values"] = filled_cache(model, inputs.latents)
    skipped = SETTLING_STEPS if static else 0
    # Drafts are accepted or not by the host, so its clock sees what self-speculation takes
    on_host = use_mtp or not (static or device.is_gpu)
    streamer, clock = Clock(), StepClock(device)
    if on_host:
        options["streamer"] = streamer
    else:
        options["logits_processor"] = LogitsProcessorList([clock])
    output = model.generate(
        input_ids=inputs.ids,
        attention_mask=torch.ones_like(inputs.ids),
        max_new_tokens=new_tokens + skipped + 1,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    if on_host:
        seconds, steps = streamer.seconds_a_step(inputs.ids.shape[0])
    else:
        seconds, steps = clock.seconds_a_step(skipped)
    notes = {}
    if use_mtp:
        notes = {"drafted": output.mtp_drafted_tokens, "accepted": output.mtp_accepted_tokens}
    return Turn(seconds, steps, notes)


@torch.inference_mode()
def prefill(model: PreTrainedModel, inputs: Inputs, device: Device | None = None) -> Turn:
    """One forward over a prompt into an empty cache, with the logits of its last token."""
    cache = DynamicCache(config=model.config)
    seconds, _ = (device or Device()).timed(
        lambda: model(input_ids=inputs.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    )
    return Turn(seconds)


def training_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, inputs: Inputs, device: Device | None = None
) -> Turn:
    """Forward, backward and optimizer step on one batch; gradients are dropped afterwards."""

    def step() -> torch.Tensor:
        loss = model(input_ids=inputs.ids, labels=inputs.ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss

    seconds, loss = (device or Device()).timed(step)
    optimizer.zero_grad(set_to_none=True)
    return Turn(seconds, 1, {"loss": loss.item()})


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW over what trains. The rate is so small that models which share weights leave each other's as they are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-12, weight_decay=0.0, fused=True)
