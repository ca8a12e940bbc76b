"""Decode speed and cache size, measured on a model as it is."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed


SAMPLING = ("temperature", "top_p", "top_k")


def decoding_figures(model: PreTrainedModel, passages: torch.Tensor, new_tokens: int, seed: int) -> dict[str, Any]:
    """Decode speed and, for a model with MTP layers, how often their drafts are accepted.

    Args:
        passages: int64 `(n, length)`, what is continued by `new_tokens` tokens; speeds use half of them.
        seed: of the sampled acceptance rate.
    """
    timed = passages[::2]
    figures: dict[str, Any] = {
        "prompt_tokens": passages.shape[1],
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "greedy_tokens_per_second": greedy_tokens_per_second(model, timed, new_tokens),
    }
    if len(getattr(getattr(model, "model", None), "mtp_layers", ())):
        set_seed(seed)
        figures["greedy_mtp_tokens_per_second"] = greedy_tokens_per_second(model, timed, new_tokens, use_mtp=True)
        figures["mtp_acceptance_rate"] = mtp_acceptance_rate(model, passages, new_tokens, do_sample=False)
        figures["mtp_acceptance_rate_sampled"] = mtp_acceptance_rate(model, passages, new_tokens, do_sample=True)
    return figures


def prefill_tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, rounds: int = 5) -> float:
    """Tokens a second of the pass over a prompt that fills the cache, the median of `rounds` after one to warm up.

    Args:
        prompt: int64 `(length,)`.
    """
    ids = prompt[None].to(model.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            started = time.perf_counter()
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
            logits.sum().item()  # waits for devices that run on their own
            seconds.append(time.perf_counter() - started)
    return prompt.numel() / statistics.median(seconds[1:])


def spaced_passages(stream: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` passages of `length` tokens, evenly spaced over a stream: `(count, length)`."""
    length = min(length, stream.numel())
    starts = torch.linspace(0, stream.numel() - length, count).long()
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def greedy_tokens_per_second(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, **generate_options: Any
) -> float:
    """New tokens a second of greedy decoding, one prompt after the other (batch 1), prefill included.

    Args:
        prompts: int64 `(n_prompts, length)`. Several, since the text decides how often MTP drafts are accepted, and a
            small model soon repeats itself. The first is decoded once more beforehand to warm up.
        new_tokens: tokens decoded for each prompt, whatever they are.
    """
    seconds = 0.0
    for number, prompt in enumerate(torch.cat([prompts[:1], prompts])):
        started = time.perf_counter()
        decode(model, prompt[None], new_tokens, do_sample=False, **generate_options)
        if number > 0:
            seconds += time.perf_counter() - started
    return prompts.shape[0] * new_tokens / seconds


def mtp_acceptance_rate(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, *, do_sample: bool) -> float:
    """Share of the MTP layers' drafts that the model accepts while it continues all prompts `(n, length)` at once.

    Sampling is from the model's own distribution (temperature 1, no cut).
    """
    # Every pass drafts: otherwise times would say where acceptance is measured
    output = decode(model, prompts, new_tokens, do_sample=do_sample, use_mtp=True, sampling="exact")
    return float(output.mtp_acceptance_rate)


def decode(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, *, do_sample: bool, **generate_options: Any
) -> Any:
    """Exactly `new_tokens` more tokens for each prompt of a batch without padding, as `generate` returns them."""
    # The sampling settings of the model's own generation config are put aside; greedy decoding warns about any.
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if do_sample else dict.fromkeys(SAMPLING)
    prompts = prompts.to(model.device)
    return model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=do_sample,
        return_dict_in_generate=True,
        **sampling,
        **generate_options,
    )


@torch.inference_mode()
def cache_bytes_per_token(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Bytes that the model's dynamic cache grows by a token, over all layers, from the tensors it really holds.

    Args:
        ids: int64 `(1, length)`, at least two tokens.
    """
    cache = DynamicCache(config=model.config)
    half = ids.shape[1] // 2
    sizes = []
    for piece in (ids[:, :half], ids[:, half:]):
        cache = model(input_ids=piece.to(model.device), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache_bytes(cache))
    return (sizes[1] - sizes[0]) / (ids.shape[1] - half)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache's layers, without the room kept behind them; a tensor held twice counts once."""
    # Layers that share one tensor make theirs when these are asked for
    held = ([*vars(layer).values(), layer.keys, layer.values] for layer in cache.layers)
    tensors = (value for values in held for value in values if isinstance(value, torch.Tensor))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
