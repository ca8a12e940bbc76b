"""Decode speed and cache size, measured on a model as it is."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


def greedy_decode(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, *, repeats: int = 2, **generate_options: Any
) -> tuple[float, Any]:
    """Greedy decoding of exactly `new_tokens` tokens.

    Args:
        prompt: int64 `(batch, length)`.
        repeats: runs after one that warms up; the fastest counts, as other work on the machine only slows one down.

    Returns:
        New tokens a second (prefill included), and what `generate` returned last.
    """
    prompt = prompt.to(model.device)
    best, output = float("inf"), None
    for attempt in range(repeats + 1):
        started = time.perf_counter()
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            # Sampling settings of the model's own generation config, which greedy decoding warns about.
            temperature=None,
            top_p=None,
            top_k=None,
            return_dict_in_generate=True,
            **generate_options,
        )
        if attempt > 0:
            best = min(best, time.perf_counter() - started)
    return prompt.shape[0] * new_tokens / best, output


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
    """Bytes of storage behind all tensors of a cache's layers; tensors that share storage count once."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
