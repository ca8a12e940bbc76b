"""What the quickstart measures on the checkpoint it saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline, set_seed
from transformers.utils import logging

import transformers_dsv3  # noqa: F401  registers the plugin's classes with the Auto classes

from ..data.byte_bpe import token_stream
from ..data.text_files import Corpus
from .decoding import cache_bytes_per_token, decoding_figures, greedy_tokens_per_second, spaced_passages
from .machine import load_average
from .routing import routing_report
from .text_quality import bits_per_byte, compressor_bits_per_byte


PYTHON_PROMPTS = ("def main(", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n\ndef read_")


def measure_checkpoint(
    folder: Path,
    corpus: Corpus,
    *,
    window: int,
    prompts: tuple[str, ...],
    seed: int,
    new_tokens: int = 64,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Load the folder through the Auto classes and measure what the quickstart prints.

    Args:
        window: tokens of context for bits per byte; decoding continues held-out passages of half as many.
        prompts: what the pipeline completes, sampling as the folder's generation config says, from `seed`.
        say: is told what is being measured.

    Returns:
        `held_out` (bits per byte), `routing` (load of the experts on the same text), `decode` (tokens a second, MTP
        acceptance), `cache_bytes_per_token`, `completions` and `machine`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [document.text for document in corpus.held_out]
    held_out_bytes = "".join(texts).encode("utf-8")
    stream = token_stream(tokenizer, texts)

    say(f"Measuring the loss on {len(held_out_bytes) / 1e6:.2f} MB of held-out text …")
    quality = bits_per_byte(model, stream, len(held_out_bytes), window=window, stride=window // 2)
    say("Measuring decoding, beside native Transformers …")
    with one_thread():
        decoding = measure_decoding(folder, model, spaced_passages(stream, 8, window // 2), new_tokens, seed)
        set_seed(seed)
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
        completions = [
            {"prompt": prompt, "text": writer(prompt, return_full_text=False)[0]["generated_text"]}
            for prompt in prompts
        ]
    say("Measuring the use of experts …")
    routing = routing_report(model, stream, window=window).to_dict()
    return {
        "held_out": {
            "bits_per_byte": quality.value,
            **{f"{name}_bits_per_byte": bits for name, bits in compressor_bits_per_byte(held_out_bytes).items()},
            "tokens": quality.tokens,
            "bytes": quality.bytes,
            "window": window,
            "stride": window // 2,
        },
        "routing": routing,
        **decoding,
        "completions": completions,
        "machine": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "load_average_1min": load_average(),
        },
    }


def measure_decoding(
    folder: Path, model: PreTrainedModel, passages: torch.Tensor, new_tokens: int, seed: int
) -> dict[str, Any]:
    """Decode speed, MTP acceptance and cache size, with native Transformers on the same checkpoint beside it.

    Args:
        passages: int64 `(n, length)`, what is continued by `new_tokens` tokens; speeds use half of them.
    """
    decode = decoding_figures(model, passages, new_tokens, seed)
    cache = {"plugin": cache_bytes_per_token(model, passages[:1])}
    with native_model(folder) as native:
        decode["native_greedy_tokens_per_second"] = greedy_tokens_per_second(native, passages[::2], new_tokens)
        cache["native"] = cache_bytes_per_token(native, passages[:1])
    return {"decode": decode, "cache_bytes_per_token": cache}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for decoding: a model this small gains nothing from a second, and loses much if a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def native_model(folder: Path) -> Iterator[PreTrainedModel]:
    """The same checkpoint in Transformers' own DeepSeek-V3 class, past the Auto classes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the MTP layer's tensors, which it has no place for
    try:
        config = transformers.DeepseekV3Config.from_pretrained(folder)
        yield transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config)
    finally:
        logging.set_verbosity(verbosity)


def prompts_from(corpus: Corpus, count: int = 3, length: int = 40) -> tuple[str, ...]:
    """Beginnings of held-out documents, cut before the last word: prompts for text of any kind."""
    prompts = []
    for document in corpus.held_out:
        text = document.text.strip()
        head = text[:length]
        if len(text) > length and " " in head.strip():
            head = head.rsplit(" ", 1)[0]
        if head and head not in prompts:
            prompts.append(head)
    if len(prompts) < count:
        text = "".join(document.text for document in corpus.held_out)
        step = max(len(text) // count, 1)
        prompts += [piece for piece in (text[i : i + length].strip() for i in range(0, len(text), step)) if piece]
    return tuple(prompts[:count])
